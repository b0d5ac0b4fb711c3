from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tersor._errors import TersorError
from tersor.drag.data import LAYOUTS, Clip, ClipFolder, read_numbers, write_clip


def clip(frames: int = 4, side: int = 20) -> Clip:
    """Two squares: number 3 goes right by 2 pixels a frame, number 300 stands and is hidden in the last frame."""
    masks = np.zeros((frames, side, side), np.int32)
    for frame in range(frames):
        masks[frame, 3:8, 2 + 2 * frame : 7 + 2 * frame] = 3
        if frame < frames - 1:
            masks[frame, 12:17, 4:9] = 300
    pictures = np.random.default_rng(0).integers(0, 255, (frames, side, side, 3), dtype=np.uint8)
    return Clip("two", pictures, masks)


def written(folder: Path, names: tuple[str, str] = ("frames", "masks"), name: str = "two") -> Path:
    """The clip as files, the mask with 16 bits."""
    own = clip()
    for index, (frame, mask) in enumerate(zip(own.frames, own.masks, strict=True)):
        for kind, picture in zip(names, (frame, mask.astype(np.uint16)), strict=True):
            file = folder / kind / name / f"{index:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(file)
    return folder


def test_entities_follow_the_centres_of_their_masks_and_stay_where_they_were_seen_last() -> None:
    scene = clip().scene()
    moved, hidden = (each.centers(4) for each in scene.entities)
    np.testing.assert_allclose(moved, [[4 + 2 * frame, 5] for frame in range(4)])
    np.testing.assert_allclose(hidden, [[6, 14]] * 4)
    assert [each.name for each in scene.entities] == ["two: entity 3", "two: entity 300"]


def test_a_known_motion_is_taken_in_the_place_of_the_masks() -> None:
    own = clip()
    known = Clip(own.name, own.frames, own.masks, {3: np.array([[0, 0], [0, 1], [0, 2], [0, 3]])})
    np.testing.assert_allclose(known.scene([3]).entities[0].centers(4)[-1], [4, 8])


@pytest.mark.parametrize("names", LAYOUTS)
def test_folders_of_several_data_sets_are_read(tmp_path: Path, names: tuple[str, str]) -> None:
    clips = ClipFolder(written(tmp_path, names), 3, 20, 20)
    assert len(clips) == 1
    found, own = clips[0], clip()
    np.testing.assert_array_equal(found.frames, own.frames[:3])
    np.testing.assert_array_equal(found.masks, own.masks[:3])
    assert found.numbers() == [3, 300]


def test_frames_and_masks_are_resized_and_numbers_stay_whole(tmp_path: Path) -> None:
    found = ClipFolder(written(tmp_path), 2, 10, 40)[0]
    assert found.frames.shape == (2, 10, 40, 3) and found.masks.shape == (2, 10, 40)
    assert set(np.unique(found.masks)) == {0, 3, 300}


def test_masks_of_a_palette_are_its_places(tmp_path: Path) -> None:
    picture = Image.fromarray(np.array([[0, 7], [2, 0]], np.uint8)).convert("P")
    picture.putpalette([*range(256)] * 3)
    picture.save(tmp_path / "palette.png")
    assert read_numbers(tmp_path / "palette.png").tolist() == [[0, 7], [2, 0]]
    Image.new("RGB", (2, 2)).save(tmp_path / "colours.png")
    with pytest.raises(TersorError, match="is in colours"):
        read_numbers(tmp_path / "colours.png")


def test_what_cannot_be_trained_on_is_named_before_training(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="must hold frames/ and masks/ or"):
        ClipFolder(tmp_path, 2, 20, 20)
    folder = written(tmp_path)
    with pytest.raises(TersorError, match="has 4 frames, fewer than 5"):
        ClipFolder(folder, 5, 20, 20)
    (folder / "masks" / "two" / "002.png").unlink()
    with pytest.raises(TersorError, match=r"002\.png and 0 more masks are missing"):
        ClipFolder(folder, 3, 20, 20)
    written(tmp_path, name="whole")
    some = ClipFolder(folder, 3, 20, 20)
    assert len(some) == 1 and [*some.left_out] == ["two"] and "masks are missing" in some.left_out["two"]
    (folder / "frames" / "whole" / "000.png").unlink()
    assert len(ClipFolder(folder, 2, 20, 20)) == 2
    for each in (folder / "frames" / "whole").iterdir():
        each.unlink()
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(folder / "masks" / "two" / "000.png")
    with pytest.raises(TersorError, match=r"000\.png holds no entity"):
        ClipFolder(folder, 2, 20, 20)


def test_a_video_and_its_masks_become_a_clip_of_a_data_set(tmp_path: Path) -> None:
    source = written(tmp_path / "source")
    (source / "masks" / "two" / "999.png").write_bytes((source / "masks" / "two" / "000.png").read_bytes())
    assert write_clip(source / "frames" / "two", source / "masks" / "two", tmp_path / "set", "judo") == 4
    found, own = ClipFolder(tmp_path / "set", 4, 20, 20)[0], clip()
    np.testing.assert_array_equal(found.frames, own.frames)
    np.testing.assert_array_equal(found.masks, own.masks)
    (source / "masks" / "two" / "001.png").unlink()
    with pytest.raises(TersorError, match=r"lacks 001 and 0 more of the frames' names"):
        write_clip(source / "frames" / "two", source / "masks" / "two", tmp_path / "set", "judo")


def test_masks_of_an_animation_are_taken_in_their_order(tmp_path: Path) -> None:
    source = written(tmp_path / "source")
    frames = [Image.fromarray(each) for each in clip().frames]
    frames[0].save(tmp_path / "film.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert write_clip(tmp_path / "film.webp", source / "masks" / "two", tmp_path / "set", "film") == 4
    (source / "masks" / "two" / "003.png").unlink()
    with pytest.raises(TersorError, match="holds 3 masks for 4 frames"):
        write_clip(tmp_path / "film.webp", source / "masks" / "two", tmp_path / "set", "film")
