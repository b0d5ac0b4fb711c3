"""A photograph's figures are those of the prefill that a user would run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tersor import zoo
from tersor.kv.bench.photos import measure_photo
from tersor.kv.zipvl import ZipVL

RECIPE = ZipVL(tau=0.6, min_tokens=0)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (96, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert("L").save(tmp_path / "grey.png")
    return tmp_path / "grey.png"


def test_what_is_kept_is_what_a_sparse_prefill_keeps(photo: Path) -> None:
    model, processor = zoo.load_model("tiny-vlm-small"), zoo.load_processor("tiny-vlm-small")
    found = measure_photo(model, processor, photo, "count red", RECIPE, repeats=3)
    assert found.name == "grey.png"
    assert {name: len(seconds) for name, seconds in found.times.samples.items()} == {"dense": 3, "ZipVL": 3}
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "count red"}]}]
    text = processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.open(photo).convert("RGB")], return_tensors="pt")
    with RECIPE.on(model) as session, torch.no_grad():
        model(**inputs)
        expected = session.stats
    assert found.stats.tokens == expected.tokens == (inputs["input_ids"].shape[1],)
    assert found.stats.token_ratio == expected.token_ratio < 1
    kept, wanted = ([layer[0].tolist() for layer in stats.kept] for stats in (found.stats, expected))
    assert kept == wanted


def test_the_turns_are_dense_and_sparse(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed: without recipe every layer attends to all tokens, with it to those that it keeps."""
    model, processor = zoo.load_model("tiny-vlm-small"), zoo.load_processor("tiny-vlm-small")
    seen: dict[str, torch.Tensor] = {}

    def once(functions, **options):
        assert options["repeats"] == 2
        with model.lm_head.register_forward_hook(lambda *call: seen.setdefault(name, call[-1])):
            for name, function in functions.items():  # noqa: B007
                function()

    monkeypatch.setattr("tersor.kv.bench.photos.time_paired", once)
    measure_photo(model, processor, photo, "count red", RECIPE, repeats=2)
    assert list(seen) == ["dense", "ZipVL"]
    assert seen["dense"].shape[1] == seen["ZipVL"].shape[1] == 1, "logits of the last token alone"
    assert not torch.allclose(seen["dense"], seen["ZipVL"], atol=1e-3)


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"notes\.png is no picture"):
        measure_photo(None, None, tmp_path / "notes.png", "", RECIPE, repeats=2)  # type: ignore[arg-type]
