"""Clips to train on: frames with a mask of whole numbers for each, from folders, and scenes made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tersor import _atomic
from tersor._errors import TersorError
from tersor._images import image_files, opened, read_frames, read_picture
from tersor._lazy import require
from tersor.drag.scene import Entity, Scene

#: Where frames and masks of a data set lie: ours, VIPSeg, DAVIS, YouTube-VOS.
LAYOUTS = (
    ("frames", "masks"),
    ("imgs", "panomasks"),
    ("JPEGImages/480p", "Annotations/480p"),
    ("JPEGImages", "Annotations"),
)


@dataclass(frozen=True, eq=False)
class Clip:
    """A video with what is where in it.

    Args:
        name: In messages.
        frames: uint8 ``[frames, height, width, 3]``.
        masks: Whole numbers ``[frames, height, width]``: which entity each pixel is of; 0 is none.
        motions: Of entities whose motion is known, where they are from where they began, ``[frames, 2]`` as (x, y).
    """

    name: str
    frames: np.ndarray
    masks: np.ndarray
    motions: Mapping[int, np.ndarray] = field(default_factory=dict)

    def numbers(self) -> list[int]:
        """The entities of the first frame; others cannot be dragged."""
        return [int(each) for each in np.unique(self.masks[0]) if each]

    def scene(self, numbers: Sequence[int] | None = None) -> Scene:
        """The entities of the first frame, each on its path.

        Where the motion is not known, the path is that of the centre of the mask's largest circle in every frame, as in
        the authors' data set. An entity that is hidden stays where it was seen last.

        Args:
            numbers: Which of them, in their order; all if left out.
        """
        entities = [
            Entity(self.masks[0] == number, self._path(number), f"{self.name}: entity {number}")
            for number in (self.numbers() if numbers is None else numbers)
        ]
        height, width = self.masks.shape[1:]
        return Scene(width, height, len(self.frames), tuple(entities))

    def _path(self, number: int) -> np.ndarray:
        if number in self.motions:
            return self.motions[number]
        found: list[tuple[float, float]] = []
        for mask in self.masks == number:
            if mask.any():
                circle = Entity(mask, [(0, 0)]).circle()
                found.append((circle.x, circle.y))
            else:
                found.append(found[-1])
        return np.array(found)


class Clips(Protocol):
    """What a training reads: as many clips as ``len``, each of as many frames on the same size."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Clip: ...


class ClipFolder:
    """Clips of a folder: ``<frames>/<clip>/*`` and ``<masks>/<clip>/*``, named as in `LAYOUTS`.

    A mask is a picture of whole numbers with the name of its frame: a palette's places, or 8 or 16 bits of grey.

    Args:
        folder: Holds the two folders.
        num_frames: Of each clip, from its first on.
        height: That frames are resized to.
        width: That frames are resized to.

    Attributes:
        left_out: Name of a clip that cannot be trained on -> why.

    Raises:
        TersorError: If there is no such folder, or no clip can be trained on.
    """

    def __init__(self, folder: Path, num_frames: int, height: int, width: int) -> None:
        pairs = [(folder / frames, folder / masks) for frames, masks in LAYOUTS]
        found = next((pair for pair in pairs if all(each.is_dir() for each in pair)), None)
        if found is None:
            raise TersorError(f"{folder} must hold {' or '.join(f'{a}/ and {b}/' for a, b in LAYOUTS)}")
        self.num_frames, self.size = num_frames, (width, height)
        self.left_out: dict[str, str] = {}
        self._files: list[list[tuple[Path, Path]]] = []
        for clip in sorted(each for each in found[0].iterdir() if each.is_dir() and not each.name.startswith(".")):
            try:
                self._files.append(self._pairs(clip, found[1] / clip.name))
            except TersorError as error:
                self.left_out[clip.name] = str(error)
        if not self._files:
            why = next(iter(self.left_out.values()), f"{found[0]} holds no folders of frames")
            raise TersorError(f"{folder} holds no clip to train on: {why}")

    def _pairs(self, frames: Path, masks: Path) -> list[tuple[Path, Path]]:
        listed = image_files(frames, below=False)[: self.num_frames]
        if len(listed) < self.num_frames:
            raise TersorError(f"{frames} has {len(listed)} frames, fewer than {self.num_frames}")
        pairs = [(each, masks / f"{each.stem}.png") for each in listed]
        if missing := [mask for _, mask in pairs if not mask.is_file()]:
            raise TersorError(f"{missing[0]} and {len(missing) - 1} more masks are missing; each frame needs one")
        if not read_numbers(pairs[0][1]).any():
            raise TersorError(f"{pairs[0][1]} holds no entity; the first frame of a clip needs one")
        return pairs

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Clip:
        image: Any = require("PIL.Image", "drag")
        files = self._files[index]
        frames = [read_picture(each, extra="drag").resize(self.size, image.Resampling.BICUBIC) for each, _ in files]
        masks = [
            np.asarray(image.fromarray(read_numbers(mask)).resize(self.size, image.Resampling.NEAREST))
            for _, mask in files
        ]
        return Clip(files[0][0].parent.name, np.stack([np.asarray(each) for each in frames]), np.stack(masks))


def read_numbers(file: Path) -> np.ndarray:
    """The whole numbers of a mask's file, int32 ``[height, width]``; raises `TersorError` for a picture in colours."""
    with opened(file, extra="drag") as picture:
        if picture.mode not in ("P", "L", "1") and not picture.mode.startswith("I"):
            raise TersorError(f"{file} is in colours; a mask holds a whole number for each pixel (a palette, or grey)")
        return np.asarray(picture).astype(np.int32)


def write_clip(video: Path, masks: Path, out: Path, name: str) -> int:
    """Put a video and its masks into a data set that `ClipFolder` reads; returns how many frames it has.

    Args:
        video: A folder of frames, or an animated picture.
        masks: A folder of masks: those named as the frames, or as many as the video has, in their order.
        out: Folder of the data set; clips that are there stay.
        name: Of the clip.

    Raises:
        TersorError: If a frame has no mask, sizes differ, or nothing is in the first mask.
    """
    image: Any = require("PIL.Image", "drag")
    frames, listed = read_frames(video, option="--video"), image_files(masks, below=False, option="--masks")
    if video.is_dir():
        stems = [each.stem for each in image_files(video, below=False)]
        named = {each.stem: each for each in listed}
        if missing := [stem for stem in stems if stem not in named]:
            raise TersorError(f"--masks {masks} lacks {missing[0]} and {len(missing) - 1} more of the frames' names")
        listed = [named[stem] for stem in stems]
    elif len(listed) != len(frames):
        raise TersorError(f"--masks {masks} holds {len(listed)} masks for {len(frames)} frames")
    numbers = [read_numbers(each) for each in listed]
    for file, frame, mask in zip(listed, frames, numbers, strict=True):
        if mask.shape != (frame.height, frame.width):
            raise TersorError(f"{file} is {mask.shape}, its frame {(frame.height, frame.width)} (height, width)")
    if not numbers[0].any():
        raise TersorError(f"{listed[0]} holds no entity; the first frame needs one")
    for index, (frame, mask) in enumerate(zip(frames, numbers, strict=True)):
        for folder, picture in (("frames", frame), ("masks", image.fromarray(mask.astype(np.uint16)))):
            file = out / folder / name / f"{index:05}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            with _atomic.replacing(file) as scratch:
                picture.save(scratch, "PNG")
    return len(frames)
