"""Words that a newcomer does not know are explained where they are used, or not used."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from tersor.bench.records import read_jsonl
from tersor.bench.scoreboard import GLOSSARY, explained
from tersor.cli import app

ROOT = Path(__file__).resolve().parent.parent
#: Word -> what must stand beside it, in the same text, if it is used.
WORDS = {
    "shares?": None, "steps": None, "minima": None, "probes": None, "nominal": None, "contenders?": None,
    "if time were passes": None, "planted": "inserted", "raster": "token",
}  # fmt: skip


def texts() -> Iterator[tuple[str, str]]:
    """The help of every command and of every option."""

    def walk(command: Any, path: str) -> Iterator[tuple[str, str]]:
        yield path, command.help or ""
        for option in command.params:
            yield f"{path} {option.name}", getattr(option, "help", None) or ""
        for name, below in getattr(command, "commands", {}).items():
            yield from walk(below, f"{path} {name}")

    yield from walk(typer.main.get_command(app), "tersor")
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        yield page.name, page.read_text(encoding="utf-8").replace("tiny-raster", "")


@pytest.mark.parametrize("word", WORDS)
def test_a_hard_word_is_explained_or_absent(word: str) -> None:
    beside = WORDS[word]
    found = [(name, text) for name, text in texts() if re.search(rf"(?<![-'\w]){word}\b(?!-)", text)]
    assert [name for name, text in found if beside is None or beside not in text.lower()] == []


def test_the_scoreboard_explains_the_words_of_its_rows() -> None:
    records = read_jsonl(ROOT / "benchmarks" / "results" / "demo.jsonl")
    shown = dict(explained(records, "item", "quantity", "unit", "peer_name", "claim_source"))
    assert {"raster", "nominal", "if time were passes", "steps", "salient"} <= set(shown)
    assert "nominal" not in dict(explained(records, "item", "quantity")), "only what is shown is explained"
    assert set(shown) == set(GLOSSARY), "a word that no row uses needs no explanation"
