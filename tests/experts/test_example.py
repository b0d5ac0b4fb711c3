"""The example runs as it is, with small random models in the checkpoints' places."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import SHAPE
from transformers import MistralConfig, MistralForCausalLM
from tuned_models import tuned

from tersor import zoo

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "experts_mistral.py"


@pytest.mark.filterwarnings("ignore:only .* calibration tokens")
def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    tokenizer = zoo.load("tiny-lm")[1]
    torch.manual_seed(0)
    base = MistralForCausalLM(MistralConfig(**{**SHAPE, "vocab_size": len(tokenizer)}, head_dim=8)).eval()
    for name, model in {"base": base, "math": tuned(base, 1), "chat": tuned(base, 2)}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        (tmp_path / f"{name}.txt").write_text("a line of text\nand another one\n")
    monkeypatch.chdir(tmp_path)
    options = ["--base", "base", "--expert", "math=math", "chat=chat", "--calibration", "math.txt", "chat.txt"]
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, "how many?", *options, "--max-new-tokens", "4"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out
    assert all(f"\n{name}: " in said for name in ("math", "chat", "base"))
    assert " GB instead of " in said
    assert (tmp_path / "bank" / "math" / "delta_config.json").is_file()
