"""Python in README and docs runs; tables, pictures and figures are those that the committed records give."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import tables
from pages import front

from tersor import zoo

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def namespace() -> dict[str, object]:
    """What a reader has before the first line: a model with its inputs."""
    model, tokenizer = zoo.load("tiny-lm")
    inputs = tokenizer(zoo.book()[:400], return_tensors="pt")
    return {"model": model, "tokenizer": tokenizer, "inputs": inputs}


@pytest.mark.parametrize(
    "page", [p for p in PAGES if BLOCK.search(p.read_text(encoding="utf-8"))], ids=lambda p: p.name
)
def test_python_blocks_run(
    page: Path, namespace: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, str(page), "exec"), namespace)


def test_generated_files_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    for path, text in tables.build().items():
        assert path.read_text(encoding="utf-8") == text, f"run benchmarks/tables.py: {path} is out of date"


def test_every_figure_of_readme_is_made_from_a_record() -> None:
    """What is typed by hand, outside code and addresses, holds years and the oldest Python alone."""
    python = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    for page in front.FRONT_PAGES:
        text = front._PART.sub("", page.read_text(encoding="utf-8"))
        text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)
        typed = re.findall(r"(?<![\w.-])\d[\d.,]*\d|(?<![\w.-])\d(?!\w)", text)
        figures = [each for each in typed if not re.fullmatch(r"20\d\d", each) and each != python.removeprefix(">=")]
        assert figures == [], page


def test_nothing_points_at_missing_files() -> None:
    link = re.compile(r"\]\((?!https?://|#)([^)#]+)")
    for page in PAGES:
        for target in link.findall(page.read_text(encoding="utf-8")):
            base = ROOT / "docs" if page.parent.name == "tables" else page.parent
            assert (base / target).exists(), f"{page}: {target}"
