"""Image tokenizers: round trips, refusals, and names and shapes of published weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from diffusers import VQModel

from tersor._lazy import MissingExtraError
from tersor.grids.tokenizer import DiffusersTokenizer, PatchTokenizer, PatchTokenizerConfig, load_tokenizer
from tersor.grids.vq import VQTokenizer, VQTokenizerConfig, convert_vq

SMALL = {"base_channels": 8, "norm_groups": 4, "latent_channels": 12, "codebook_size": 30, "code_width": 4}


def random_images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def patches() -> PatchTokenizer:
    return PatchTokenizer.fit(random_images(40, 3, 8, 12), patch_size=4, codebook_size=20, seed=1, rounds=5)


@pytest.fixture(scope="module")
def vq() -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(VQTokenizerConfig(channel_multipliers=(1, 2, 2), **SMALL)).eval()


@pytest.fixture(scope="module")
def diffusers_vq() -> DiffusersTokenizer:
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    sizes = {"block_out_channels": [8, 8, 16], "latent_channels": 4, "num_vq_embeddings": 30, "norm_num_groups": 4}
    return DiffusersTokenizer(VQModel(**blocks, **sizes).eval())


TOKENIZERS = ("patches", "vq", "diffusers_vq")


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest):
    return request.getfixturevalue(request.param)


def test_ids_have_the_shape_of_the_grid_and_images_come_back(tokenizer) -> None:
    images = random_images(3, 3, 8, 12)
    ids = tokenizer.encode(images)
    assert ids.shape == (3, *tokenizer.grid_size((8, 12))) == (3, 2, 3)
    assert ids.dtype == torch.long
    assert ids.min() >= 0 and ids.max() < tokenizer.codebook_size
    restored = tokenizer.decode(ids)
    assert restored.shape == images.shape
    assert restored.min() >= 0 and restored.max() <= 1
    # One image of a batch does not depend on the others.
    assert torch.equal(tokenizer.encode(images[1:2]), ids[1:2])
    torch.testing.assert_close(tokenizer.decode(ids[1:2]), restored[1:2], rtol=1e-5, atol=1e-5)


def test_bad_images_and_ids_are_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="multiple of 4 pixels"):
        tokenizer.encode(random_images(1, 3, 8, 10))
    with pytest.raises(ValueError, match="multiple of 4 pixels"):
        tokenizer.grid_size((0, 8))
    for images in (random_images(1, 1, 8, 12), random_images(3, 8, 12), torch.zeros(1, 3, 8, 12, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="floats from 0 to 1"):
            tokenizer.encode(images)
    size = tokenizer.codebook_size
    for ids in (torch.full((1, 2, 3), size), torch.full((1, 2, 3), -1), torch.zeros(1, 6, dtype=torch.long)):
        with pytest.raises(ValueError, match=f"from 0 to {size - 1}"):
            tokenizer.decode(ids)


def test_patches_are_those_of_the_nearest_entry(patches: PatchTokenizer) -> None:
    images = random_images(5, 3, 8, 12)
    ids = patches.encode(images)
    for sample, row, column in ((0, 0, 0), (4, 1, 2), (2, 1, 0)):
        patch = images[sample, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        distances = (patches.codebook - patch.flatten()).square().sum(1)
        assert ids[sample, row, column] == distances.argmin()
        shown = patches.decode(ids)[sample, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert torch.equal(shown.flatten(), patches.codebook[ids[sample, row, column]])


def test_fitting_lowers_the_error_and_repeats() -> None:
    errors: list[float] = []
    settings = {"patch_size": 2, "codebook_size": 16, "seed": 3}
    images = random_images(50, 1, 8, 8)
    first = PatchTokenizer.fit(images, **settings, on_progress=lambda _, error: errors.append(error))
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]
    assert torch.equal(first.codebook, PatchTokenizer.fit(images, **settings).codebook)


def test_as_many_entries_as_distinct_patches_lose_nothing() -> None:
    images = (random_images(9, 1, 4, 4) > 0.5).float()
    tokenizer = PatchTokenizer.fit(images, patch_size=1, codebook_size=2, seed=0)
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), images)
    with pytest.raises(ValueError, match="2 distinct patches, codebook_size is 3"):
        PatchTokenizer.fit(images, patch_size=1, codebook_size=3, seed=0)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="codebook_size=0"):
        PatchTokenizerConfig(codebook_size=0)
    with pytest.raises(ValueError, match="norm_groups=32"):
        VQTokenizerConfig(base_channels=40)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_saved_folder_loads_as_what_it_was(name: str, request: pytest.FixtureRequest, tmp_path) -> None:
    tokenizer = request.getfixturevalue(name)
    (tokenizer.model if name == "diffusers_vq" else tokenizer).save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer)
    images = random_images(2, 3, 8, 12)
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))


def test_other_folders_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="says 'bert'"):
        load_tokenizer(tmp_path)


def test_diffusers_missing_names_the_extra(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tersor\[images\]'"):
        DiffusersTokenizer.from_pretrained(tmp_path)


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
