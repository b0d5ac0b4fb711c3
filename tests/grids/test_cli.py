"""`tersor images`."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest
import torch
from invoke import run

from tersor._lazy import MissingExtraError
from tersor.grids.cli import images
from tersor.grids.drawing import as_svg, write_gif
from tersor.grids.geometry import RasterGrid
from tersor.grids.llamagen import LlamaGen, LlamaGenConfig
from tersor.grids.schedule import ZipARSchedule
from tersor.grids.tokenizer import PatchTokenizer

GRID = ["schedule", "--grid", "90x90", "--window", "7"]


def test_the_schedule_counts_passes() -> None:
    facts = json.loads(run(images, *GRID, "--json").output)
    assert (facts["passes"], facts["raster_passes"], facts["window"]) == (713, 8190, 7)
    assert facts["reduction"] == pytest.approx(0.913, abs=1e-3)
    assert facts["row_start_pass"][:3] == [1, 8, 15]
    text = run(images, *GRID).output
    assert "713 forward passes instead of 8,190: 91.3% fewer, 11.36 tokens a pass" in text
    facts = json.loads(
        run(images, "schedule", "--grid", "24X24", "--window", "quality", "--row-start", "auto", "--json").output
    )
    assert (facts["row_start"], facts["window"], facts["passes"]) == ("conservative", 16, 48 + 22 * 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "90"], "90x90"),
        (["--grid", "0x4"], "90x90"),
        (["--grid", "4x-1"], "90x90"),
        (["--grid", "99999x99999"], "at most"),
        (["--window", "0"], "whole number"),
        (["--window", "-3"], "whole number"),
        (["--window", "wide"], "unknown"),
        (["--row-start", "never"], "must be one of"),
        (["--out", "order.png"], ".svg or .gif"),
    ],
)
def test_bad_input(arguments, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run(images, "schedule", *arguments)


def test_the_schedule_is_drawn_with_end_of_row_tokens(tmp_path) -> None:
    order, arguments = ZipARSchedule(RasterGrid(4, 5, end_of_row=True), 2, "eol"), ("--grid", "4x5", "--window", "2")
    out = tmp_path / "deep" / "order.svg"
    run(images, "schedule", *arguments, "--out", str(out))
    assert out.read_text(encoding="utf-8") == as_svg(order)
    pytest.importorskip("PIL.Image")
    write_gif(order, tmp_path / "wanted.gif")
    run(images, "schedule", *arguments, "--out", str(out.with_suffix(".gif")))
    assert out.with_suffix(".gif").read_bytes() == (tmp_path / "wanted.gif").read_bytes()
    assert sorted(each.name for each in out.parent.iterdir()) == ["order.gif", "order.svg"]


def test_a_gif_without_pillow_names_the_extra(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingExtraError, match=r"extra images.*pip install"):
        run(images, "schedule", "--grid", "4x5", "--out", str(tmp_path / "order.gif"))


def test_the_schedule_loads_no_torch() -> None:
    import subprocess

    code = "import sys, tersor.grids.schedule, tersor.grids.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A small class-conditional model with its tokenizer, as a user saves them."""
    path = tmp_path_factory.mktemp("raster")
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_classes": 5}
    LlamaGen(LlamaGenConfig(**sizes, grid_size=(6, 8))).save_pretrained(path)
    tokenizer = PatchTokenizer.fit(torch.rand(20, 3, 12, 16), patch_size=2, codebook_size=12, seed=0, rounds=2)
    tokenizer.save_pretrained(path / "tokenizer")
    return path


def make(folder, out, *arguments: str) -> dict:
    return json.loads(run(images, "generate", "--model", str(folder), "--out", str(out), "--json", *arguments).output)


def test_images_are_made_and_counted(folder, tmp_path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    out = tmp_path / "deep" / "grid.png"
    facts = make(folder, out, "--window", "3", "-n", "5", "--labels", "1,4")
    assert facts["passes"] == [2 * 8 + 4 * 3]
    assert facts["raster_passes"] == 48
    assert facts["labels"] == [1, 4, 1, 4, 1]
    assert (facts["window_size"], facts["adaptive"]) == (3, False)
    with pillow.open(out) as sheet:
        assert sheet.size == (7 * (3 * 16 + 2), 7 * (2 * 12 + 1))
    text = run(images, "generate", "--model", str(folder), "--out", str(out), "--window", "3", "-n", "2").output
    assert "2 images in" in text and "28 forward passes each instead of 48" in text


def test_the_seed_decides_and_the_full_window_is_raster(folder, tmp_path) -> None:
    sheets = {}
    for name, arguments in {
        "raster": ["--method", "raster", "--seed", "1"],
        "full": ["--window", "8", "--seed", "1"],
        "other": ["--window", "8", "--seed", "2"],
        "adaptive": ["--window", "2", "--adaptive", "--seed", "1"],
    }.items():
        facts = make(folder, tmp_path / f"{name}.png", "-n", "3", "--guidance-scale", "1.5", *arguments)
        sheets[name] = (tmp_path / f"{name}.png").read_bytes()
        if name == "adaptive":
            assert facts["passes"][0] >= 2 * 8 + 4 * 3
    assert sheets["raster"] == sheets["full"] != sheets["other"]


@pytest.mark.parametrize("method", ["raster", "zipar", "speculative"])
def test_an_image_with_a_seed_of_its_own_is_the_same_in_every_sheet(folder, tmp_path, method) -> None:
    pillow = pytest.importorskip("PIL.Image")
    out = tmp_path / "a.png"

    def image(seeds: str, number: int) -> bytes:
        facts = make(folder, out, "--method", method, "--seeds", seeds, "--labels", "3")
        assert facts["seed"] == [int(each) for each in seeds.split(",")] and facts["images"] == len(facts["seed"])
        with pillow.open(out) as sheet:
            return sheet.crop((number * 119, 0, number * 119 + 112, 84)).tobytes()

    assert image("7", 0) == image("5,7", 1) != image("5,7", 0)


def test_speculative_decoding_makes_the_sheet_of_raster(folder, tmp_path) -> None:
    pytest.importorskip("PIL.Image")
    common = ["-n", "3", "--seed", "1", "--temperature", "0.5"]
    make(folder, tmp_path / "raster.png", "--method", "raster", *common)
    sheet = (tmp_path / "raster.png").read_bytes()
    for number, settings in enumerate(([], ["--window", "5"], ["--first-drafts", "law above"], ["--mode", "law"])):
        out = tmp_path / f"{number}.png"
        facts = make(folder, out, "--method", "speculative", *settings, *common)
        assert facts["method"] == "speculative" and facts["passes"][0] < 48
        assert facts["fed_tokens"][0] >= 47
        assert len(facts["acceptance"]) == 6 and all(0 <= each <= 1 for each in facts["acceptance"])
        assert (out.read_bytes() == sheet) == ("law" not in settings)


def test_greedy_decoding_needs_no_seed(folder, tmp_path) -> None:
    for seed in ("1", "2"):
        make(folder, tmp_path / f"{seed}.png", "-n", "2", "--temperature", "0", "--seed", seed)
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()


def test_the_zoo_model_is_the_default(tmp_path) -> None:
    out = tmp_path / "grid.png"
    facts = json.loads(run(images, "generate", "--window", "7", "-n", "2", "--out", str(out), "--json").output)
    assert (facts["model"], facts["passes"]) == ("tiny-raster", [28 + 12 * 7])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "beam"], "'zipar' or 'raster'"),
        (["--method", "raster", "--window", "3"], "settings of --method zipar"),
        (["--method", "raster", "--adaptive"], "settings of --method zipar"),
        (["--method", "speculative", "--adaptive"], "settings of --method zipar"),
        (["--method", "speculative", "--window", "0"], "at least 1, or 'auto'"),
        (["--method", "speculative", "--window", "fast"], "at least 1, or 'auto'"),
        (["--method", "speculative", "--mode", "exact"], "must be one of"),
        (["--method", "speculative", "--first-drafts", "below"], "must be one of"),
        (["--mode", "law"], "settings of --method speculative"),
        (["--method", "raster", "--first-drafts", "left"], "settings of --method speculative"),
        (["--window", "0"], "whole number"),
        (["--window", "wide"], "unknown"),
        (["--row-start", "eol"], "has no end-of-row tokens"),
        (["-n", "0"], "from 1 to 10,000"),
        (["--labels", "5"], "--labels 5: '5' is no class of this model; it has 0 to 4"),
        (["--labels", "1,,2"], "'' is no class"),
        (["--seeds", "1,x"], "whole numbers"),
        (["--seeds", "1,2", "--seed", "3"], "goes without --seed"),
        (["--seeds", "1,2", "-n", "3"], "2 --seeds"),
        (["--seeds", "1,2", "--adaptive"], "test all together"),
        (["--seeds", "1,2", "--method", "speculative", "--mode", "law"], "test all together"),
        (["--temperature", "-1"], "must not be negative"),
        (["--top-k", "-1"], "must not be negative"),
        (["--guidance-scale", "-1"], "must not be negative"),
        (["--out", "grid.jpg"], "must end in .png"),
        (["--model", "no-such"], "no such folder"),
        (["--model", "tiny-lm"], "takes a LlamaGen"),
    ],
)
def test_bad_requests_for_images(arguments, message, folder, monkeypatch, tmp_path) -> None:
    def refuse(*_, **__):
        raise AssertionError("the weights were loaded before the request was checked")

    monkeypatch.setattr(LlamaGen, "from_pretrained", refuse)
    monkeypatch.chdir(tmp_path)
    given = arguments if "--model" in arguments else ["--model", str(folder), *arguments]
    with pytest.raises(ValueError, match=re.escape(message)):
        run(images, "generate", *given)
    assert not list(tmp_path.iterdir())


def test_incomplete_folders_are_refused(folder, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        run(images, "generate", "--model", str(tmp_path))
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(ValueError, match="has no image tokenizer"):
        run(images, "generate", "--model", str(tmp_path))
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"condition": "text", "condition_tokens": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="conditioned on text features"):
        run(images, "generate", "--model", str(tmp_path))
