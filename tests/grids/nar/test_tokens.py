"""Token files: what is encoded, kept and refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from nar_models import model

from tersor.grids.drawing import as_png
from tersor.grids.nar.pipeline import TubeletTokenizer
from tersor.grids.nar.tokens import Tokens, extract, read_source
from tersor.grids.tokenizer import PatchTokenizer


def tokens(n: int = 24, grid: tuple[int, ...] = (3, 4)) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20, (n, *grid), generator=generator)
    return Tokens(ids, 20, {"class_labels": torch.arange(n) % 5})


def test_a_token_file_comes_back_as_it_was(tmp_path) -> None:
    data = tokens(grid=(2, 3, 4))
    data.save(tmp_path / "tokens.safetensors")
    again = Tokens.load(tmp_path / "tokens.safetensors")
    assert torch.equal(again.ids, data.ids.int()) and again.vocab_size == 20 and again.grid_size == (2, 3, 4)
    batch = again.__getitems__([3, 1])
    assert torch.equal(batch["input_ids"], data.ids[[3, 1]].flatten(1)) and batch["class_labels"].tolist() == [3, 1]
    assert torch.equal(again[3]["labels"], batch["labels"][0])
    first, other = again.split(5, seed=1)
    assert (len(first), len(other)) == (19, 5)
    assert sorted([*first.ids.flatten(1).tolist(), *other.ids.flatten(1).tolist()]) == sorted(
        data.ids.flatten(1).tolist()
    )
    assert torch.equal(first.ids, again.split(5, seed=1)[0].ids)
    assert [each.name for each in tmp_path.iterdir()] == ["tokens.safetensors"]


def test_other_files_are_no_token_files(tmp_path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"not at all")
    model((3, 4)).save_pretrained(tmp_path)
    for name in ("a", "model"):
        with pytest.raises(ValueError, match="no token file"):
            Tokens.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="no such file"):
        Tokens.load(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("ids", "conditions", "message"),
    [
        (torch.zeros(2, 12, dtype=torch.long), {}, "rows, columns"),
        (torch.full((2, 3, 4), 20), {}, "has 0 to 19"),
        (torch.zeros(2, 3, 4, dtype=torch.long), {"weight": torch.ones(2)}, "must be one of"),
        (torch.zeros(2, 3, 4, dtype=torch.long), {"class_labels": torch.ones(3, dtype=torch.long)}, "for 2 samples"),
        (torch.zeros(2, 3, 4, dtype=torch.long), {"class_labels": torch.ones(2)}, "whole numbers"),
    ],
)
def test_bad_tokens(ids, conditions, message) -> None:
    with pytest.raises(ValueError, match=message):
        Tokens(ids, 20, conditions)


@pytest.fixture
def tokenizer() -> PatchTokenizer:
    images = torch.rand(20, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    return PatchTokenizer.fit(images, patch_size=2, codebook_size=8, seed=0, rounds=2)


def test_a_folder_of_classes_is_encoded(tmp_path, tokenizer) -> None:
    pixels = (torch.rand(6, 1, 4, 6, generator=torch.Generator().manual_seed(1)) * 255).round() / 255
    for index, image in enumerate(pixels):
        file = tmp_path / "pictures" / f"class{index % 2}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(as_png(image[None]))
    told: list[int] = []
    found = extract(read_source(tmp_path / "pictures"), tokenizer, lambda done, count: told.append(done))
    assert found.conditions["class_labels"].tolist() == [0, 0, 0, 1, 1, 1] and told == [6]
    assert torch.equal(found.ids, tokenizer.encode(pixels[[0, 2, 4, 1, 3, 5]]))
    (tmp_path / "pictures" / "loose.png").write_bytes(as_png(pixels[:1]))
    with pytest.raises(ValueError, match="give every class a folder"):
        read_source(tmp_path / "pictures")


def test_pictures_of_two_sizes_are_refused(tmp_path) -> None:
    for size in (4, 6):
        (tmp_path / f"{size}.png").write_bytes(as_png(torch.zeros(1, 1, size, size)))
    with pytest.raises(ValueError, match=r"4 x 4 L, 6\.png: 6 x 6 L"):
        read_source(tmp_path)
    with pytest.raises(ValueError, match="no pictures"):
        read_source(Path(__file__).parent)
    with pytest.raises(ValueError, match="give a folder"):
        read_source(tmp_path / "none.npz")


def test_arrays_are_encoded(tmp_path, tokenizer) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, class_labels=np.arange(5))
    found = extract(read_source(tmp_path / "a.npz"), tokenizer)
    assert torch.equal(found.ids, tokenizer.encode(torch.from_numpy(pixels)[:, None].float() / 255))
    clips = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 6, 1), dtype=np.uint8)
    np.savez(tmp_path / "b.npz", images=clips)
    stacked = PatchTokenizer.fit(torch.rand(9, 2, 4, 6), patch_size=2, codebook_size=8, seed=0, rounds=1)
    found = extract(read_source(tmp_path / "b.npz"), TubeletTokenizer(stacked, 2))
    assert found.grid_size == (2, 2, 3) and not found.conditions


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros((2, 4, 4), np.uint8)}, "holds nothing"),
        ({"images": np.zeros((2, 4, 4))}, "float64"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "class_labels": np.zeros(3)}, "an entry for each"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "class_labels": np.array([{}, {}])}, "cannot be read"),
    ],
)
def test_bad_arrays(tmp_path, arrays, message) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_source(tmp_path / "a.npz")


@pytest.mark.parametrize("vocabulary", [256, 257, 512, 2**15, 2**15 + 1, 70_000])
def test_ids_beyond_a_byte_and_beyond_two_come_back(vocabulary: int, tmp_path: Path) -> None:
    """The file keeps ids in the smallest integers that hold the whole vocabulary, and none wraps around."""
    ids = torch.tensor([[[0, 1], [vocabulary // 2, vocabulary - 1]], [[vocabulary - 2, 3], [2, 255]]])
    Tokens(ids, vocabulary, {}).save(tmp_path / "tokens.safetensors")
    again = Tokens.load(tmp_path / "tokens.safetensors")
    assert torch.equal(again.ids.long(), ids) and again.vocab_size == vocabulary


def test_classes_are_counted_as_people_do_and_a_broken_picture_is_found_before_anything_is_encoded(tmp_path) -> None:
    for name in ("10", "9", ".cache"):
        (tmp_path / name).mkdir()
        shade = int(name) if name.isdigit() else 0
        (tmp_path / name / "a.png").write_bytes(as_png(torch.full((1, 1, 4, 4), shade / 255)))
    source = read_source(tmp_path)
    assert source.conditions["class_labels"].tolist() == [0, 1]
    assert [round(255 * block.mean().item()) for block in next(source.blocks())] == [9, 10]
    whole = (tmp_path / "10" / "a.png").read_bytes()
    (tmp_path / "10" / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.png is no picture"):
        read_source(tmp_path)
