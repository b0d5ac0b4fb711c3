// The keys 1 to 4 press the buttons; a second press while the page loads does nothing.
let sent = false;
document.addEventListener("submit", (event) => {
  if (sent) event.preventDefault();
  sent = true;
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
  document.querySelector(`button[name=choice][value="${CSS.escape(event.key)}"]`)?.click();
});
window.addEventListener("pageshow", () => { sent = false; });
