"""What a judge's words mean: one of five labels, or nothing. Nothing is ever guessed.

Thoughts, markup and quotations are put aside; then every place that names a verdict is looked for. One verdict,
however often, is the answer; of several, the last counts if it is marked as the final one. A verdict that is denied or
hedged in its sentence is none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tersor.opening.records import Label

_NOUN = r"(?i:(?:the\s+)?(?:model|answer|output|response|candidate|option|assistant|choice)s?[\s_:#-]*)"
_HOW = (
    r"(?i:(?:the|a|an|much|far|slightly|clearly|marginally|significantly|somewhat|definitely|still|also|overall|only"
    r"|generally|simply|more|strongly|preferred|a\s+bit|a\s+little)\s+)*"
)
_LEANING = (
    r"(?i:(?:but|with|a|an|the|is|leaning|leans?|slight(?:ly)?|small|towards?|to|in|favou?r|of|for|preference|edge"
    r"|advantage|though)\s+)*"
)
_IS = r"\s+(?i:is|was|seems|appears|seems\s+to\s+be|appears\s+to\s+be)\s+"
_SHUT = r"(?!\s*(?i:and\b|or\b|vs\b|&|/|,\s*[AB]\b))"
_MENTION = re.compile(
    rf"""
    \[\[\s*(?:(?P<box>[AB])|(?P<box_tie>(?i:C|tie|equal)|A\s*=+\s*B|B\s*=+\s*A)|(?P<more>[AB])\s*>+\s*[AB]
      |[AB]\s*<+\s*(?P<less>[AB])|(?i:tie)\s*\(?\s*(?P<box_lean>[AB])\s*\)?)\s*\]\]
    | \b(?i:tie)\b[\s:,–—-]*(?:[(\[]\s*)?{_LEANING}{_NOUN}?(?P<lean>[AB])\b(?!\s*(?i:and\b|or\b|&|/|=))
    | \b(?i:tie)\s*\(\s*(?P<small_lean>[ab])\b
    | (?P<tie>\b(?i:tie)\b|\b(?i:a\s+draw)\b|(?i:equally\s+(?:good|bad|well))|(?i:(?:are|is|quality)\s+equal\b))
    | \b{_NOUN}?(?P<win>[AB])(?:{_IS}{_HOW}(?i:better|best|winner|preferred|preferable|superior|stronger|favou?red)\b
      |\s+(?i:wins|won)\b|\s+(?i:better\s+than)\b|\s*(?:>+|≻)\s*{_NOUN}?[AB]\b)
    | \b{_NOUN}?(?P<lose>[AB])(?:{_IS}{_HOW}(?i:worse|worst|inferior|weaker)\b|\s+(?i:loses|lost)\b
      |\s*(?:<+|≺)\s*{_NOUN}?[AB]\b)
    | (?i:\b(?:verdict|winner|answer|choice|decision|judge?ment|preference|result|conclusion)|\b(?:better|best)
      (?:\s+(?:answer|output|model|one|response))?)(?:\s*(?:(?i:is)\b|:|=|->|→))+\s*["'“(\[{{]*\s*{_NOUN}?(?P<named>[AB])\b{_SHUT}
      (?!\s*(?i:is\b|was\b|seems\b|appears\b|wins\b|loses\b|=|<|>|≻|≺))
    | (?i:\b(?:prefer|choose|pick|select|favou?r|vote\s+for|go\s+with))\s+{_NOUN}?(?P<picked>[AB])\b{_SHUT}
    """,
    re.VERBOSE,
)
_FINAL = re.compile(
    r"(?i:\bfinal\b|\bverdict\b|\boverall\b|\bconclusion\b|\btherefore\b|\bthus\b|\bhence\b|\bsummary\b|\banswer\s*:"
    r"|\bwinner\s*:|\bdecision\b)"
)
_DENIED = re.compile(
    r"(?i:\b(?:not|never|cannot|neither|nor|hardly|no|if|whether|unless|would|could|might|should|may|say|says|said"
    r"|claims?|asks?|write)\b|n['’]t\b)"
)
#: Ends a sentence, or what a word of it speaks about.
_STOP = re.compile(r"[.!?;\n]|,?\s+(?i:but|however|yet)\b")
_THOUGHT_STARTS = re.compile(r"(?i)<(?:think|thinking|reasoning|thought|scratchpad)>|◁think▷")
_THOUGHT_ENDS = re.compile(r"(?i)</(?:think|thinking|reasoning|thought|scratchpad)>|◁/think▷")
#: Characters at the end of a reply in which its verdict is looked for.
_LONGEST = 4000
_LATEX = re.compile(r"\\(?:boxed|text)\s*\{([^{}]*)\}")
_KEYS = ("verdict", "winner", "answer", "label", "choice", "decision", "better")
_SMALL = re.compile(
    rf"(?i)\W*(?:(?:verdict|answer|winner)\W+)?{_NOUN}?(?P<side>[AB])(?:\s+(?:is\s+)?better|\s+wins)?\W*"
)


@dataclass(frozen=True)
class _Mention:
    label: Label
    final: bool
    boxed: bool


def parse(text: str) -> Label | None:
    """The label that a reply names, A being the answer that was shown first; None where it names none for certain.

    Args:
        text: All that the judge replied, with its thoughts if it showed them.
    """
    text = without_thoughts(text)[-_LONGEST:]
    if (verdict := _from_json(text)) is not None:
        text = verdict
    text = _LATEX.sub(r"\1", _LATEX.sub(r"\1", text))
    text = re.sub(r"[*`$~]|\b_+|_+\b|^\s*#+", "", text).strip()
    if (whole := _SMALL.fullmatch(text)) is not None:
        return "A" if whole["side"] in "Aa" else "B"
    found = list(_mentions(text))
    if boxed := [each for each in found if each.boxed]:
        found = boxed
    if not found:
        return None
    same = len({each.label for each in found}) == 1
    return found[-1].label if same or found[-1].final else None


def thought_only(text: str) -> bool:
    """Whether a reply holds thoughts and no answer, because it was cut off before."""
    return bool(text.strip()) and not without_thoughts(text)


def without_thoughts(text: str) -> str:
    """What a reply says after the thoughts that reasoning models put before their answer."""
    text = _THOUGHT_ENDS.split(text)[-1]  # where thoughts start is sometimes part of the prompt
    return _THOUGHT_STARTS.split(text)[0].strip()


def _mentions(text: str) -> Iterator[_Mention]:
    for found in _MENTION.finditer(text):
        group = next(name for name, value in found.groupdict().items() if value is not None)
        before = _STOP.split(text[: found.start()])[-1]
        boxed = group in ("box", "box_tie", "more", "less", "box_lean")
        if not boxed and (_DENIED.search(before) or _quoted(text, found)):
            continue
        after = text[found.end() : found.end() + 20]
        final = boxed or group == "named" or bool(_FINAL.search(before) or re.match(r"(?i)\W*overall\b", after))
        yield _Mention(_label(group, found[group]), final, boxed)


def _label(group: str, side: str) -> Label:
    if group in ("tie", "box_tie"):
        return "Tie"
    if group in ("lean", "box_lean", "small_lean"):
        return "Tie(A)" if side in "Aa" else "Tie(B)"
    wins = (side == "A") != (group == "lose")
    return "A" if wins else "B"


def _quoted(text: str, found: re.Match[str]) -> bool:
    """Whether a verdict stands in quotation marks that no colon or "is" leads up to."""
    before = text[: found.start()]
    return bool(re.search(r"[\"“«]\s*$", before)) and not re.search(r"(?i)(?:^|:|=|\bis|→|->)\s*[\"“«]\s*$", before)


def _from_json(text: str) -> str | None:
    """The verdict in a JSON object, wherever in the text that stands."""
    for start in (each.start() for each in re.finditer(r"\{", text)):
        try:
            record, _ = json.JSONDecoder().raw_decode(text[start:])
        except (ValueError, RecursionError):
            continue
        values = [record[key] for key in _KEYS if isinstance(record.get(key), str)]
        if values:
            return str(values[0])
    return None
