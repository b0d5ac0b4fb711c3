"""The authors' checkpoints of images and videos: read name by name, written back bit for bit, or refused."""

from __future__ import annotations

import argparse

import pytest
import torch
from original_weights import VIDEO, broken, original_weights
from safetensors.torch import save_file

from tersor.grids.nar.convert import convert_nar, original_state_dict
from tersor.grids.nar.heads import NARForImageGeneration

IMAGE = (4, 5)


def convert(path, kind, **options) -> NARForImageGeneration:
    grid = VIDEO if kind == "video" else IMAGE
    return convert_nar(path, **{"grid_size": grid, "num_attention_heads": 4, **options})


@pytest.mark.parametrize("kind", ["image", "text", "video"])
def test_round_trip_is_bit_equal(tmp_path, kind) -> None:
    weights = original_weights(kind)
    trained = {"model": {**weights, "freqs_cis": torch.ones(3)}, "steps": 3, "args": argparse.Namespace(lr=1e-4)}
    torch.save(trained, tmp_path / "c.pt")
    of = convert(tmp_path / "c.pt", kind)
    back = original_state_dict(of)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    config = of.config
    assert (config.num_hidden_layers, config.num_classes) == (2, 1000 if kind == "text" else 7)
    assert (config.condition, config.default_guidance) == {
        "image": ("class", 2.0), "text": ("text", 7.5), "video": ("class", 1.25)
    }[kind]  # fmt: skip
    assert (config.position_type, config.head_layers) == {
        "video": ("learned", (0, 1, 1))
    }.get(kind, ("rope", (0, 1)))  # fmt: skip
    of.save_pretrained(tmp_path / "saved")
    again = NARForImageGeneration.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(each, again.state_dict()[name]) for name, each in of.state_dict().items())


@pytest.mark.parametrize("kind", ["image", "video"])
def test_files_of_both_trainers_and_safetensors(tmp_path, kind) -> None:
    weights = original_weights(kind)
    torch.save({"model": {"name": "llama-abs-L", "args": {}, "sd": weights}}, tmp_path / "trainer.pt")
    torch.save(weights, tmp_path / "bare.pt")
    save_file(weights, tmp_path / "c.safetensors")
    for name in ("trainer.pt", "bare.pt", "c.safetensors"):
        assert torch.equal(convert(tmp_path / name, kind).model.tok_embeddings.weight, weights["tok_embeddings.weight"])


@pytest.mark.parametrize("kind", ["image", "text", "video"])
def test_what_sampling_left_in_the_model_is_no_weight(tmp_path, kind) -> None:
    weights = original_weights(kind)
    left = {f"layers.{layer}.attention.kv_cache.{part}_cache": torch.ones(2, 4, 8, 16) for layer in range(3)
            for part in "kv"}  # fmt: skip
    torch.save({**weights, **left, "causal_mask": torch.ones(2, 8, 8, dtype=torch.bool)}, tmp_path / "c.pt")
    back = original_state_dict(convert(tmp_path / "c.pt", kind))
    assert back.keys() == weights.keys()


def test_each_head_reads_the_block_that_it_was_trained_on(tmp_path) -> None:
    # The authors' forward, of one cell after its prefix, written down from their layout.
    weights = original_weights("video")
    torch.save(weights, tmp_path / "c.pt")
    of = convert(tmp_path / "c.pt", "video")
    inputs = torch.randn(1, 3, 64)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    with torch.no_grad():
        states = of.model(inputs, torch.arange(3), None, mask)
        hidden = inputs + weights["abs_pe"][:, :3]
        for layer, block in enumerate(of.model.layers):
            hidden = block(hidden, None, mask, None)
            if layer >= 1:
                head = layer - 1
                name = "RDB"[head]
                torch.testing.assert_close(states[head], hidden)
                normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-5)
                expected = normed * weights[f"norm_{name}.weight"] @ weights[f"output_{name}.weight"].T
                torch.testing.assert_close(of.outputs[head](of.norms[head](states[head])), expected)


def raster(weights):
    return {name: each for name, each in weights.items() if "medusa" not in name}


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("image", raster, "raster LlamaGen checkpoint.*from_raster"),
        ("image", lambda w: broken(w, **{"medusa_norm.weight": None}), r"missing \['medusa_norm.weight'\]"),
        ("image", lambda w: broken(w, **{"extra.weight": torch.ones(1)}), r"unknown \['extra.weight'\]"),
        ("image", lambda w: broken(w, abs_pe=torch.ones(1, 3, 64)), r"unknown \['abs_pe'\]"),
        (
            "image",
            lambda w: broken(w, **{"medusa_output.weight": torch.ones(51, 64)}),
            r"medusa_output.weight: \(51, 64\), not \(50, 64\)",
        ),
        ("image", lambda w: broken(w, **{"tok_embeddings.weight": None}), "no NAR checkpoint"),
        ("image", lambda w: {"layers.0": torch.ones(1)}, "no NAR checkpoint"),
        ("video", lambda w: broken(w, **{"norm_B.weight": None}), r"missing \['norm_B.weight'\]"),
        ("video", lambda w: broken(w, abs_pe=torch.ones(1, 9, 64)), r"abs_pe: \(9, 64\), not \(25, 64\)"),
        ("video", lambda w: {"a": 1}, "no state dict"),
        ("video", lambda w: [1], "no state dict"),
    ],
)
def test_other_files_are_refused(tmp_path, kind, content, message) -> None:
    torch.save(content(original_weights(kind)), tmp_path / "c.pt")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "c.pt", kind)


@pytest.mark.parametrize(("kind", "grid"), [("image", (2, 4, 5)), ("video", (4, 6)), ("image", (0, 5))])
def test_the_grid_has_the_axes_of_the_checkpoint(tmp_path, kind, grid) -> None:
    torch.save(original_weights(kind), tmp_path / "c.pt")
    with pytest.raises(ValueError, match="must have"):
        convert(tmp_path / "c.pt", kind, grid_size=grid)


def test_heads_are_known_for_published_widths_only(tmp_path) -> None:
    torch.save(original_weights("image"), tmp_path / "c.pt")
    with pytest.raises(ValueError, match="64 wide; give num_attention_heads"):
        convert(tmp_path / "c.pt", "image", num_attention_heads=None)


def test_a_file_cannot_run_code(tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"model": Evil()}, tmp_path / "c.pt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        convert(tmp_path / "c.pt", "image")
