"""The example runs as it is, with a tiny SVD in the checkpoint's place."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from drag_models import svd
from PIL import Image

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "drag_svd.py"


def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    svd().save_pretrained(tmp_path / "svd")
    for frame in range(2):
        mask = np.zeros((16, 16), np.uint8)
        mask[3:11, 2 + frame : 10 + frame] = 1
        for name, pixels in (("frames", np.full((16, 16, 3), 60 * frame, np.uint8)), ("masks", mask)):
            (tmp_path / "clips" / name / "one").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "clips" / name / "one" / f"{frame}.png")
    options = ["--model", str(tmp_path / "svd"), "--data", str(tmp_path / "clips"), "--out", str(tmp_path / "run"),
               "--steps", "1", "--frames", "2", "--height", "16", "--width", "16", "--passes", "1"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, *options])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "1 of 1: " in capsys.readouterr().out
    assert (tmp_path / "run" / "controlnet" / "config.json").is_file()
    with Image.open(tmp_path / "run" / "first.gif") as film:
        assert film.size == (16, 16)
