"""`tersor train` and `tersor images generate` with NAR models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from invoke import run
from nar_models import model, tokenizer

from tersor.grids.cli import images
from tersor.grids.nar.cli import as_gif


@pytest.fixture
def clips(tmp_path) -> Path:
    model((2, 3, 4)).save_pretrained(tmp_path / "clips")
    tokenizer(2, tmp_path / "clips" / "tokenizer")
    return tmp_path / "clips"


def test_a_video_model_makes_a_gif(clips, tmp_path) -> None:
    image = pytest.importorskip("PIL.Image")
    out = tmp_path / "clip.gif"
    arguments = ["generate", "--model", str(clips), "-n", "3", "--labels", "4,1", "--out", str(out), "--json"]
    facts = json.loads(run(images, *arguments).stdout)
    assert facts["passes"] == [7] and facts["raster_passes"] == 24 and facts["conditions"] == [4, 1, 4]
    first = out.read_bytes()
    with image.open(out) as gif:
        assert gif.n_frames == 4, "two frames a token"
    run(images, *arguments)
    assert out.read_bytes() == first


def test_a_gif_shows_the_frames_in_order() -> None:
    image = pytest.importorskip("PIL.Image")
    import io

    shades = torch.tensor([0.0, 0.5, 1.0])
    with image.open(io.BytesIO(as_gif(shades.view(1, 3, 1, 1, 1).expand(2, 3, 1, 4, 4)))) as gif:
        seen = []
        for number in range(gif.n_frames):
            gif.seek(number)
            seen.append(gif.convert("L").getpixel((1, 1)))
    assert seen == pytest.approx([0, 128, 255], abs=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "a.png"], "makes clips"),
        (["--method", "zipar"], "does not go with"),
        (["--window", "3"], "settings of --method zipar"),
        (["--prompt", "a seven"], "takes no --prompt"),
        (["--labels", "5"], "it has 0 to 4"),
        (["--seeds", "1,2"], "-n 1 and 2 --seeds"),
        (["--guidance-scale", "0.5"], "guidance_scale=0.5"),
    ],
)
def test_bad_generation(clips, tmp_path, arguments, message) -> None:
    options = {"--model": str(clips), "--out": str(tmp_path / "a.gif"), "-n": "1"}
    options |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    with pytest.raises(ValueError, match=re.escape(message)):
        run(images, "generate", *(each for pair in options.items() for each in pair))
    assert not (tmp_path / "a.gif").exists()


def test_raster_models_have_no_fronts(tmp_path) -> None:
    with pytest.raises(ValueError, match="--method nar does not go with"):
        run(images, "generate", "--model", "tiny-raster", "--method", "nar", "--out", str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="--prompt is for models that read text"):
        run(images, "generate", "--prompt", "a seven", "--out", str(tmp_path / "a.png"))
