"""The examples run as they are, with a tiny random model in the checkpoint's place."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BatchFeature,
    Emu3ForConditionalGeneration,
    Emu3Processor,
    JanusForConditionalGeneration,
    JanusProcessor,
)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


class Processor:
    """Gives a case's inputs for any text, and keeps the pixels it is to make pictures of."""

    def __init__(self, case, monkeypatch, kind) -> None:
        self.case, self.pixels = case, []
        monkeypatch.setattr(kind, "from_pretrained", lambda *_, **__: self)

    def apply_chat_template(self, messages, **_):
        return messages[0]["content"][0]["text"]

    def __call__(self, text, **settings):
        given = self.case.inputs(1, False)
        if "return_for_image_generation" in settings:
            given["image_sizes"] = torch.tensor([self.case.grid])
        return BatchFeature(given)

    def postprocess(self, pixels, **_):
        self.pixels += pixels
        return {"pixel_values": [SimpleNamespace(save=lambda path: None) for _ in pixels]}


@pytest.mark.parametrize(
    ("name", "model", "processor", "options", "passes"),
    [
        ("emu3", Emu3ForConditionalGeneration, Emu3Processor, ["--window", "2"], "8 forward passes instead of 15"),
        (
            "janus",
            JanusForConditionalGeneration,
            JanusProcessor,
            ["--window", "2", "--images", "2"],
            "12 forward passes instead of 16",
        ),
    ],
)
def test_examples(cases, monkeypatch, capsys, name, model, processor, options, passes) -> None:
    case = cases(name)
    monkeypatch.setattr(model, "from_pretrained", lambda *_, **__: case.model)
    fake = Processor(case, monkeypatch, processor)
    monkeypatch.setattr(sys, "argv", [f"zipar_{name}.py", "a lighthouse", *options])
    runpy.run_path(str(EXAMPLES / f"zipar_{name}.py"), run_name="__main__")
    assert passes in capsys.readouterr().out
    assert len(fake.pixels) == (2 if name == "janus" else 1)
    assert all(torch.isfinite(each).all() for each in fake.pixels)
