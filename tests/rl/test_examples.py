"""ZipR1's example, with a tiny model of the real class in the checkpoint's place."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from zipr1 import drawn, policy

from tersor.zoo.processor import PictureProcessor


def test_the_example_trains_adapters_of_the_real_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    policy(tmp_path)
    lines = []
    for index, row in enumerate(drawn(4)):
        row["images"][0].save(tmp_path / f"{index}.png")
        question = row["prompt"][0]["content"]
        lines.append(json.dumps({"image": f"{index}.png", "question": question, "answer": row["answer"][0]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    # Without torchvision the auto class cannot make Qwen2.5-VL's processor for videos.
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", PictureProcessor.from_pretrained)
    monkeypatch.setattr(
        sys, "argv",
        ["zipr1_qwen2_5_vl.py", "--model", str(tmp_path / "policy"), "--data", str(tmp_path / "rows.jsonl"), "--out",
         str(tmp_path / "run"), "--verifier", "exact", "--steps", "1", "--questions", "1", "--min-tokens", "0"],
    )  # fmt: skip
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "zipr1_qwen2_5_vl.py"), run_name="__main__")
    assert "4 questions, up to 69 tokens" in (printed := capsys.readouterr().out)
    assert "token ratio" in printed
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()
