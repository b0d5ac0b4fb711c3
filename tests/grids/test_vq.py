"""LlamaGen's tokenizer: the published weights, and its codes."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from raster_models import random_images, vq_tokenizer

from tersor.grids.tokenizer import load_tokenizer
from tersor.grids.vq import VQTokenizer, VQTokenizerConfig, convert_vq


@pytest.fixture(scope="module")
def vq() -> VQTokenizer:
    return vq_tokenizer()


def published(base: int, multipliers: list[int], blocks: int, latent: int, codes: int, width: int) -> Iterator:
    """Names and shapes of the authors' state dict, spelt out from their modules."""

    def conv(name: str, inputs: int, outputs: int, side: int) -> Iterator:
        yield f"{name}.weight", (outputs, inputs, side, side)
        yield f"{name}.bias", (outputs,)

    def norm(name: str, channels: int) -> Iterator:
        yield f"{name}.weight", (channels,)
        yield f"{name}.bias", (channels,)

    def residual(name: str, inputs: int, outputs: int) -> Iterator:
        yield from norm(f"{name}.norm1", inputs)
        yield from conv(f"{name}.conv1", inputs, outputs, 3)
        yield from norm(f"{name}.norm2", outputs)
        yield from conv(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            yield from conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(name: str, channels: int) -> Iterator:
        yield from norm(f"{name}.norm", channels)
        for each in ("q", "k", "v", "proj_out"):
            yield from conv(f"{name}.{each}", channels, channels, 1)

    def middle(name: str, channels: int) -> Iterator:
        yield from residual(f"{name}.0", channels, channels)
        yield from attention(f"{name}.1", channels)
        yield from residual(f"{name}.2", channels, channels)

    for side, levels in (("encoder", multipliers), ("decoder", multipliers[::-1])):
        channels = base if side == "encoder" else base * levels[0]
        yield from conv(f"{side}.conv_in", 3 if side == "encoder" else latent, channels, 3)
        for level, each in enumerate(levels):
            for block in range(blocks if side == "encoder" else blocks + 1):
                yield from residual(f"{side}.conv_blocks.{level}.res.{block}", channels, base * each)
                channels = base * each
                if each == multipliers[-1] and level == (len(levels) - 1 if side == "encoder" else 0):
                    yield from attention(f"{side}.conv_blocks.{level}.attn.{block}", channels)
            if level < len(levels) - 1:
                name = "downsample" if side == "encoder" else "upsample"
                yield from conv(f"{side}.conv_blocks.{level}.{name}.conv", channels, channels, 3)
        yield from middle(f"{side}.mid", base * multipliers[-1])
        yield from norm(f"{side}.norm_out", channels)
        yield from conv(f"{side}.conv_out", channels, latent if side == "encoder" else 3, 3)
    yield "quantize.embedding.weight", (codes, width)
    yield "quantize.codebook_used", (65536,)
    yield from conv("quant_conv", latent, width, 1)
    yield from conv("post_quant_conv", width, latent, 1)


def test_vq16_has_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        model = VQTokenizer(VQTokenizerConfig())
    expected = dict(published(128, [1, 1, 2, 2, 4], 2, 256, 16384, 8))
    del expected["quantize.codebook_used"]
    assert {name: tuple(each.shape) for name, each in model.state_dict().items()} == expected
    assert model.grid_size((384, 384)) == (24, 24)


def original(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = published(8, [1, 1, 2], 2, 12, 30, 4)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes} | changes


@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
def test_published_weights_are_converted(wrapper, tmp_path) -> None:
    weights = original()
    torch.save({wrapper: weights} if wrapper else weights, tmp_path / "vq.pt")
    model = convert_vq(tmp_path / "vq.pt", norm_groups=4)
    del weights["quantize.codebook_used"]
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(each, weights[name]) for name, each in model.state_dict().items())
    model.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    images = random_images(1, 3, 16, 16)
    ids = again.encode(images)
    assert ids.shape == (1, 4, 4)
    assert torch.equal(ids, model.encode(images))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra.weight": torch.zeros(1)}, "unknown ['extra.weight']"),
        ({"quant_conv.bias": torch.zeros(3)}, "quant_conv.bias: (3,), not (4,)"),
        ({"quantize.embedding.weight": torch.zeros(3)}, "is no LlamaGen tokenizer: it has"),
    ],
)
def test_other_weights_are_refused(changes, message, tmp_path) -> None:
    torch.save(original(**changes), tmp_path / "vq.pt")
    with pytest.raises(ValueError, match=re.escape(message)):
        convert_vq(tmp_path / "vq.pt", norm_groups=4)


def test_what_is_no_state_dict_is_refused(tmp_path) -> None:
    torch.save({"model": {"epoch": 3}}, tmp_path / "vq.pt")
    with pytest.raises(ValueError, match="no state dict"):
        convert_vq(tmp_path / "vq.pt")


def test_codes_are_compared_as_unit_vectors(vq: VQTokenizer) -> None:
    """The authors' rule: normalize latents and codes, take the code at the least distance."""
    images = random_images(2, 3, 8, 8)
    with torch.no_grad():
        latents = vq.quant_conv(vq.encoder(2 * images - 1))
    codes = torch.nn.functional.normalize(vq.quantize.embedding.weight, dim=-1)
    units = torch.nn.functional.normalize(latents, dim=1).permute(0, 2, 3, 1)
    distances = (units[..., None, :] - codes).square().sum(-1)
    assert torch.equal(vq.encode(images), distances.argmin(-1))
