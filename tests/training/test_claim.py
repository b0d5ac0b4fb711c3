"""A folder belongs to one run, and to the same run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tersor.training.claim import MARK, claim, last_checkpoint, made_once


def test_a_claimed_folder_is_for_the_same_facts_only(tmp_path: Path) -> None:
    facts, folder = {"steps": 3, "betas": (0.9, 0.95)}, tmp_path / "new" / "run"
    claim(folder, facts, write=False)
    assert not folder.exists()
    claim(folder, facts)
    written = (folder / MARK).read_bytes()
    (folder / "part.bin").write_bytes(b"x")
    claim(folder, facts)
    assert (folder / MARK).read_bytes() == written
    with pytest.raises(ValueError, match="belongs to another run; repeat its settings"):
        claim(folder, {**facts, "steps": 4})


def test_a_longer_run_of_the_same_facts_goes_on(tmp_path: Path) -> None:
    def facts(steps: int, seed: int = 0) -> dict:
        return {"plan": {"steps": steps, "seed": seed}, "samples": 5}

    claim(tmp_path, facts(3))
    claim(tmp_path, facts(5), write=False, grows=("plan", "steps"))
    claim(tmp_path, facts(4), grows=("plan", "steps"))
    assert json.loads((tmp_path / MARK).read_text()) == facts(4)
    for other in (facts(3), facts(5, seed=1), {"plan": 5}, {**facts(5), "samples": 6}):
        with pytest.raises(ValueError, match="belongs to another run"):
            claim(tmp_path, other, grows=("plan", "steps"))
    with pytest.raises(ValueError, match="belongs to another run"):
        claim(tmp_path, facts(5))


def test_a_folder_with_other_files_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds other files"):
        claim(tmp_path, {"steps": 3})
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_what_was_made_is_not_made_again_and_half_of_it_does_not_count(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        made.append(folder)
        if len(made) == 1:
            raise KeyboardInterrupt
        (folder / "file").write_text("whole")

    with pytest.raises(KeyboardInterrupt):
        made_once(tmp_path / "parts", {"seed": 1}, make)
    assert not (tmp_path / "parts").exists()
    for _ in range(2):
        made_once(tmp_path / "parts", {"seed": 1}, make)
    assert len(made) == 2 and (tmp_path / "parts" / "file").read_text() == "whole"
    with pytest.raises(ValueError, match="belongs to another run"):
        made_once(tmp_path / "parts", {"seed": 2}, make)
    assert len(made) == 2


def test_the_newest_whole_checkpoint_counts(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, text in ((8, '{"global_step": 8}'), (10, '{"global_step": 10}'), (12, "{"), (14, '{"steps": 14}')):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text()) == {"global_step": 10}
