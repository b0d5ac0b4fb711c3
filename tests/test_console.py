"""What is shown while a command works stays out of its output."""

from __future__ import annotations

import pytest

from tersor._console import prefixed, spinner


def test_the_spinner_writes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with spinner() as status:
        status.console.print("half done")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "half done" in captured.err


def test_progress_of_a_part_begins_with_its_name() -> None:
    told: list[str] = []
    inner = prefixed(prefixed(told.append, "outer"), "inner")
    inner("one")
    inner("two")
    assert told == ["outer: inner: one", "outer: inner: two"]
