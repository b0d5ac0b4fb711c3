"""ZipVL's example with a tiny model in the checkpoint's place."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_models import build, question


def test_the_example_prints_an_answer_and_what_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = build("qwen2_5_vl")

    class Batch(dict):
        def to(self, device):
            return self

    class Processor:
        def apply_chat_template(self, messages, **kwargs):
            return messages[0]["content"][1]["text"]

        def __call__(self, text, images, return_tensors):
            return Batch(question(net, words=250))

        def decode(self, ids, **kwargs):
            return f"answer of {len(ids)} tokens to"

    picture = tmp_path / "pic.png"
    Image.new("RGB", (28, 28)).save(picture)
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda name: Processor())
    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", lambda name, **kwargs: net)
    monkeypatch.setattr(sys, "argv", ["zipvl_qwen.py", str(picture), "What?", "--tau", "0.9", "--max-new-tokens", "6"])
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "zipvl_qwen.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "answer of 6 tokens" in printed
    assert "of 279 tokens took part" in printed
    assert "MiB instead of" in printed
