"""The example for a 7B judge, with a tiny model of the real class in the checkpoint's place."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from arena import fill
from judges import untrained

from tersor.opening.judging.adapter import read_facts
from tersor.opening.judging.runner import run_judge
from tersor.opening.judging.scripted import ScriptedJudge
from tersor.opening.prompts import JudgePrompt
from tersor.opening.store import Store


@pytest.mark.slow
def test_the_example_trains_adapters_of_the_real_class(
    tmp_path: Path, mini_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store.open(tmp_path / "run", create=True) as store:
        fill(store, mini_root, ["full", "pruned", "poor"], rounds=3, count=46)
        run_judge(store, ScriptedJudge.from_text("faults"))
    model, processor = untrained("qwen2_5_vl")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(
        sys, "argv",
        ["intjudge_qwen2_5_vl.py", "--model", str(tmp_path / "model"), "--arena", str(tmp_path / "run"), "--judge",
         "scripted:faults", "--out", str(tmp_path / "judge"), "--steps", "1", "--pairs", "1"],
    )  # fmt: skip
    script = Path(__file__).resolve().parents[3] / "examples" / "intjudge_qwen2_5_vl.py"
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "pairs to train on" in printed and "agrees in" in printed
    assert (tmp_path / "judge" / "adapter" / "adapter_model.safetensors").is_file()
    assert read_facts(tmp_path / "judge" / "adapter").prompt == JudgePrompt()
