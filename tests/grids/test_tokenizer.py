"""Image tokenizers: round trips, refusals, and names and shapes of published weights."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import VQModel
from raster_models import random_images, vq_tokenizer

from tersor._lazy import MissingExtraError
from tersor.grids.tokenizer import DiffusersTokenizer, PatchTokenizer, PatchTokenizerConfig, load_tokenizer
from tersor.grids.vq import VQTokenizer, VQTokenizerConfig


@pytest.fixture(scope="module")
def patches() -> PatchTokenizer:
    return PatchTokenizer.fit(random_images(40, 3, 8, 12), patch_size=4, codebook_size=20, seed=1, rounds=5)


@pytest.fixture(scope="module")
def vq() -> VQTokenizer:
    return vq_tokenizer()


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
    with pytest.raises(MissingExtraError, match=r"extra images.*pip install"):
        DiffusersTokenizer.from_pretrained(tmp_path)
