"""Books for the recipes of the language models."""

from __future__ import annotations

from pathlib import Path

import pytest

from tersor import zoo


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Books enough for a recipe: stretches of the held-out one under the names that it splits by."""
    from lm.data import TEST_BOOK, VALIDATION_BOOKS

    folder = tmp_path_factory.mktemp("books")
    text = zoo.book()
    for index, name in enumerate((TEST_BOOK, *VALIDATION_BOOKS, "A - One", "B - Two")):
        (folder / f"{name}.txt").write_text(text[index * 48_000 : (index + 1) * 48_000])
    return folder
