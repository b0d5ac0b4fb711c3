"""Every command of README and of the docs runs: hub models, files and long runs have stand-ins, by the rules below."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import small_demos
import typer
from PIL import Image

from tersor import zoo
from tersor.cli import app, run
from tersor.experts.bench.skills import examples
from tersor.opening.official import Row, write_rows

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TABLES = [page for page in PAGES if page.parent.name == "tables"]
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
FIRST = ("tersor ", "make ", "pip ", "python ", "accelerate ")

#: A name in the docs -> what stands in for it here: a hub model, a model of another library, or a large folder.
NAMES = {
    "Qwen/Qwen2.5-7B-Instruct": "chat", "Qwen/Qwen2.5-VL-7B-Instruct": "tiny-vlm-small", "CHECKPOINT": "tiny-vlm-small",
    "Qwen/Qwen2-VL-7B-Instruct": "tiny-judge",
    "OpenING/": "prompts", "Emu2_output": "answers/full_output", "GILL_output": "answers/pruned_output",
    "repvgg_a0": "tiny-repvgg", "Q": str(zoo.path("tiny-lm")), "vq16/": "tiny-raster",
}  # fmt: skip
#: An option of long work -> its value here. What a network of the zoo does not take is left out (None).
VALUES = {"--steps": "2", "--batch-size": "2", "--size": "32x1x2", "--save-every": "0", "-n": "2", "--weights": None}
#: Commands that need no option.
COMPLETE = (["experts", "inspect"], ["opening", "import-outputs"])
#: A command -> options that make it short.
SHORT = {
    "tersor generate --prompt-file": [],
    "tersor generate": ["--max-new-tokens", "4"],
    "tersor demo --only": [],
    "tersor demo": ["--only", "meswitch"],
    "tersor bench kv": ["--samples", "1", "--continuations", "0", "--task", "needle", "--context-bytes", "256"],
    "tersor tune": ["--tokens", "256", "--pieces", "8"],
    "tersor bench photos": ["--repeats", "2"],
    "tersor train nar": ["--size", "32x1x2", "--batch-size", "2"],
    "tersor quantize": ["--images", "16", "--iterations", "2"],
    "tersor experts router train": ["--steps", "2", "--batch", "2"],
    # Without an end, or without an endpoint here.
    "tersor opening serve": ["--help"],
    "tersor experts serve": ["--help"],
    "tersor opening judge": ["--help"],
    "tersor opening doctor": ["--help"],
    "tersor opening score": ["--help"],
    "tersor opening generate run/ --model chat:gpt-4o": ["--help"],
    "tersor opening compare": ["--help"],
    "tersor train intjudge": ["--help"],  # the example of the same parts trains
    "tersor bench opening": ["--help"],
    # Of models that nobody has here; tests/drag runs them on small ones.
    "tersor drag convert": ["--help"],
    "tersor drag render": ["--help"],
    "tersor drag evaluate": ["--help"],
    "tersor drag clip": ["--help"],
    "tersor train drag": ["--help"],
    "tersor train zipr1": [
        *("--held-out", "1", "--questions", "1", "--steps", "1", "--thresholds", "0.9,0.975"),
        *("--max-completion-length", "2", "--min-tokens", "0"),
    ],
}


def commands(page: Path) -> list[str]:
    """What a page tells to run, in its order: lines of consoles and shells, and spans that are a whole command."""
    found: list[tuple[int, str]] = []
    text = page.read_text(encoding="utf-8")
    for fence in FENCE.finditer(text):
        if fence[1] in ("console", "bash"):
            lines = fence[2].splitlines()
            told = [line.removeprefix("$ ") for line in lines if fence[1] == "bash" or line.startswith("$ ")]
            found += [(fence.start(), line) for line in told]
    rest = FENCE.sub(lambda fence: " " * len(fence[0]), text)
    found += [(s.start(), " ".join(s[1].split())) for s in SPAN.finditer(rest) if s[1].startswith(FIRST)]
    return [command for _, command in sorted(found, key=lambda each: each[0])]


TOLD = {page: commands(page) for page in PAGES}


def substituted(words: list[str]) -> list[str]:
    """The words of a tersor command with their stand-ins."""
    changed: list[str] = []
    option = ""
    for word in words:
        if option:
            value, option = VALUES[option], ""
            changed[-1:] = [] if value is None else [changed[-1], value]
            continue
        option = word if word in VALUES else ""
        name, sign, value = word.rpartition("=")
        changed.append(f"{name}{sign}{NAMES.get(value, value)}")
    extra = next((more for start, more in SHORT.items() if words[: len(start.split())] == start.split()), [])
    return changed + extra


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the commands name."""
    folder = tmp_path_factory.mktemp("workshop")
    home = zoo.path("tiny-experts")
    for name, place in (("B", home), ("M", home / "experts" / "add"), ("C", home / "experts" / "sort")):
        (folder / name).symlink_to(place)
    skills = {"math": examples("add", 40, seed=1, held_out=False), "code": examples("sort", 40, seed=1, held_out=False)}
    for name in ("math.txt", "code.txt", "held-out.txt"):
        (folder / name).write_text("".join(f"{each.prompt}{each.answer}\n" for each in skills["math"]))
    (folder / "document.txt").write_text(zoo.book()[:400])
    (folder / "texts.jsonl").write_text(f"{json.dumps({'text': zoo.book()[:4000]})}\n")
    rows = [{"text": each.prompt, "expert": expert} for expert, found in skills.items() for each in found]
    for name in ("train.jsonl", "held-out.jsonl"):
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    shutil.copytree(zoo.path("tiny-lm"), folder / "chat")
    _, tokenizer = zoo.load("tiny-lm")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder / "chat")
    for place in ("photos/0", "photos/1", "FOLDER"):
        (folder / place).mkdir(parents=True)
        Image.open(zoo.photos()[0]).resize((32, 32)).convert("L").save(folder / place / "1.png")
    Image.open(zoo.photos()[0]).resize((64, 64)).save(folder / "pic.png")
    asked = [{"image": "pic.png", "question": "color red", "answer": answer} for answer in ("red", "blue", "green")]
    (folder / "vqa.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in asked))
    make_arena(folder)
    return folder


def make_arena(folder: Path) -> None:
    """Two models' answers to prompts, a run that is decided, and verdicts as they are published."""
    page = (ROOT / "docs" / "opening.md").read_text(encoding="utf-8")
    block = next(fence[2] for fence in FENCE.finditer(page) if fence[1] == "python")
    here = Path.cwd()
    os.chdir(folder)
    try:
        exec(compile(block, "opening.md", "exec"), {})
    finally:
        os.chdir(here)
    rows = [Row(f"010100{n}", "GPT-4o+DALL-E3", "Anole", "A") for n in range(3)]
    for name in ("human.json", "intjudge.json"):
        write_rows(folder / name, rows, {})


@pytest.mark.parametrize(
    "page", [each for each in PAGES if TOLD[each] and each not in TABLES], ids=lambda page: page.name
)
def test_every_command_of_a_page_runs(page: Path, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop)
    small_demos.shrink(monkeypatch)
    for command in TOLD[page]:
        words = shlex.split(command, comments=True)
        if words[:3] == ["accelerate", "launch", "-m"]:  # the launcher itself has a test beside `tersor train`
            words = words[3:]
        CHECKS[words[0]](words)


#: Commands that ran. What a page tells again, another one may have told: what it wrote still lies in the workshop.
RAN: set[tuple[str, ...]] = set()


def run_tersor(words: list[str]) -> None:
    """A command with arguments runs, once; a mere name of one shows its help."""
    bare = not any(word.startswith("-") for word in words[1:])
    arguments = [*words[1:], "--help"] if bare and words[1:3] not in COMPLETE else substituted(words)[1:]
    if tuple(arguments) not in RAN:
        assert run(arguments) == 0, words
        RAN.add(tuple(arguments))


def plan_make(words: list[str]) -> None:
    """make would run the test itself: it is asked for its plan."""
    subprocess.run([*words, "--dry-run", "--no-print-directory"], cwd=ROOT, check=True, capture_output=True)


def check_pip(words: list[str]) -> None:
    """Installing needs an index: what is installed must be this checkout, a wheel built from it, or an extra of it."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[1] in ("install", "wheel"), words
    for word in words[2:]:
        if not word.startswith("-") and word != "dist":
            found = re.fullmatch(r"(\.|dist/tersor-[\d.]+-py3-none-any\.whl)(\[(\w+)\])?", word)
            assert found and (found[3] is None or found[3] in extras), words


def check_script(words: list[str]) -> None:
    """Scripts run on small shapes in tests of their own; here they must know their options."""
    script = (ROOT / words[1]).read_text(encoding="utf-8")
    assert all(f'"{word}"' in script for word in words[2:] if word.startswith("--")), words


CHECKS = {"tersor": run_tersor, "make": plan_make, "pip": check_pip, "python": check_script}


@pytest.mark.parametrize("page", TABLES, ids=lambda page: page.name)
def test_the_commands_below_the_tables_are_understood(page: Path) -> None:
    """They take hours: their options are parsed."""
    for command in TOLD[page]:
        words = shlex.split(command)
        if words[0] == "tersor":
            parse(words[1:])
        elif words[1].startswith("benchmarks/"):
            assert (ROOT / words[1]).is_file(), command


def parse(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, list(words))


def test_a_stand_in_is_used_where_the_rules_say_and_nowhere_else() -> None:
    words = shlex.split("tersor quantize --model repvgg_a0 --weights w.safetensors --calibration photos/ --out a.onnx")
    kept = ["--model", "tiny-repvgg", "--calibration", "photos/", "--out", "a.onnx"]
    assert substituted(words) == ["tersor", "quantize", *kept, *SHORT["tersor quantize"]]
    assert len(TOLD[ROOT / "README.md"]) >= 7
    with pytest.raises(Exception, match=r"[Nn]o such option"):
        parse(["bench", "kv", "--sample", "1"])
