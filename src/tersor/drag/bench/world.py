"""Small clips whose every motion is known: textured things on a texture, dragged in four kinds of scene.

In three of them the path starts at the same point, so that the point alone cannot tell what is to move (the paper's
figure 1, in its smallest form): a sprite on a plate, the plate with the sprite, or everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tersor._lazy import require
from tersor.drag.data import Clip

#: Kind of scene -> what moves in it.
KINDS = {
    "start": "the sprite alone, where the plate or the camera could be meant",
    "together": "the plate with its sprite",
    "crossing": "two sprites whose paths cross, half of the time before a moving ground",
    "camera": "everything",
}
SIDE, FRAMES = 24, 6
#: Pixels that a layer moves in all; those that cross must begin apart.
LEAST, MOST = 4.0, 8.0
_CROSSING = (7.0, 9.0)
#: Pixels of a texture beyond the frame on each side, which come into it.
_MARGIN = 10
#: One clip in so many of a training is of one colour.
_PLAIN = 8
#: Where the largest circle in the whole frame has its middle, and so everything else.
_MIDDLE = 11.0


@dataclass(frozen=True)
class Layer:
    """A textured thing that moves evenly.

    Args:
        texture: Float ``[side + 2 margin, side + 2 margin]``, which moves with it and is added to the colour.
        colour: ``[3]`` from 0 to 1.
        shape: ``"disc"``, ``"square"`` or ``"ground"``, which is everywhere.
        radius: Half its width in pixels.
        start: (x, y) of its middle in the first frame.
        motion: (x, y) from the first frame to the last.
        number: Of the entity that it belongs to; 0 is not asked to move.
    """

    texture: np.ndarray
    colour: np.ndarray
    shape: str
    radius: float
    start: np.ndarray
    motion: np.ndarray
    number: int = 0

    def cover(self, share: float) -> np.ndarray:
        """How much of each pixel it covers after a share of its motion, ``[side, side]``."""
        if self.shape == "ground":
            return np.ones((SIDE, SIDE))
        x, y = self.start + share * self.motion
        rows, columns = np.mgrid[:SIDE, :SIDE]
        across, down = np.abs(columns - x), np.abs(rows - y)
        distance = np.hypot(across, down) if self.shape == "disc" else np.maximum(across, down)
        found: np.ndarray = np.clip(self.radius + 0.5 - distance, 0.0, 1.0)
        return found

    def colours(self, share: float) -> np.ndarray:
        """Its texture after a share of its motion, ``[side, side, 3]``."""
        ndimage: Any = require("scipy.ndimage", "drag")
        x, y = share * self.motion
        rows, columns = np.mgrid[:SIDE, :SIDE] + float(_MARGIN)
        noise = ndimage.map_coordinates(self.texture, [rows - y, columns - x], order=1)
        found: np.ndarray = np.clip(self.colour + noise[..., None], 0.0, 1.0)
        return found


@dataclass(frozen=True)
class Sample:
    """A clip with its layers, from the ground to the front.

    Args:
        kind: One of `KINDS`.
        clip: The video, and the masks of what is asked to move.
        layers: Every layer moves as it says, asked or not.
    """

    kind: str
    clip: Clip
    layers: tuple[Layer, ...]

    def shown(self, number: int) -> np.ndarray:
        """Where a layer is seen, bool ``[frames, side, side]``."""
        found = []
        for share in np.linspace(0.0, 1.0, FRAMES):
            own = self.layers[number].cover(share) >= 0.5
            for above in self.layers[number + 1 :]:
                own &= above.cover(share) < 0.5
            found.append(own)
        return np.stack(found)


@dataclass(frozen=True)
class World:
    """A sequence of samples, each drawn by its place and the seed.

    Args:
        count: How many.
        seed: Of all draws.
        kind: One of `KINDS`; None takes each in turn.
    """

    count: int
    seed: int
    kind: str | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Clip:
        return self.sample(index).clip

    def sample(self, index: int) -> Sample:
        """The sample at a place."""
        rng = np.random.default_rng([self.seed, index])
        kind = self.kind or [*KINDS][index % len(KINDS)]
        layers = _DRAWN[kind](rng)
        return Sample(kind, render(f"{kind} {index}", layers), layers)


def render(name: str, layers: tuple[Layer, ...]) -> Clip:
    """The clip of some layers, the last of which is in front."""
    frames, masks = [], []
    for share in np.linspace(0.0, 1.0, FRAMES):
        picture, mask = np.zeros((SIDE, SIDE, 3)), np.zeros((SIDE, SIDE), np.int32)
        for layer in layers:
            cover = layer.cover(share)
            picture = picture * (1 - cover[..., None]) + layer.colours(share) * cover[..., None]
            mask[cover >= 0.5] = layer.number
        frames.append(np.rint(255 * picture).astype(np.uint8))
        masks.append(mask)
    shares = np.linspace(0.0, 1.0, FRAMES)[:, None]
    motions = {layer.number: shares * layer.motion for layer in layers if layer.number}
    return Clip(name, np.stack(frames), np.stack(masks), motions)


def with_plain(clips: Sequence[Clip], seed: int) -> list[Clip]:
    """The clips, some of them in one colour all the time, with the masks and paths that they had.

    Where nothing is to be seen, a path changes nothing: without such clips a model puts things there that it knows.

    Args:
        clips: One in eight, at random, loses what it shows.
        seed: Of the draws.
    """
    rng, found = np.random.default_rng([seed, len(clips)]), list[Clip]()
    for clip in clips:
        plain, colour = rng.random() < 1 / _PLAIN, rng.uniform(0.15, 0.85, 3)
        shown = np.full_like(clip.frames, np.rint(255 * colour).astype(np.uint8)) if plain else clip.frames
        found.append(replace(clip, name=f"plain {clip.name}" if plain else clip.name, frames=shown))
    return found


def _texture(rng: np.random.Generator, contrast: float) -> np.ndarray:
    """Smooth noise."""
    ndimage: Any = require("scipy.ndimage", "drag")
    noise = ndimage.gaussian_filter(rng.standard_normal((SIDE + 2 * _MARGIN,) * 2), 1.3)
    found: np.ndarray = contrast * noise / noise.std()
    return found


def _colour(rng: np.random.Generator) -> np.ndarray:
    """A colour away from grey."""
    colour = rng.uniform(0.15, 0.85, 3)
    while np.ptp(colour) < 0.35:
        colour = rng.uniform(0.15, 0.85, 3)
    return colour


def _motion(rng: np.random.Generator) -> np.ndarray:
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(LEAST, MOST)
    found: np.ndarray = length * np.array([np.cos(angle), np.sin(angle)])
    return found


def _ground(rng: np.random.Generator) -> Layer:
    middle = np.full(2, _MIDDLE)
    return Layer(_texture(rng, 0.1), rng.uniform(0.4, 0.6, 3), "ground", SIDE / 2, middle, np.zeros(2))


def _thing(rng: np.random.Generator, radius: float, start: np.ndarray) -> Layer:
    shape = str(rng.choice(["disc", "square"]))
    return Layer(_texture(rng, 0.12), _colour(rng), shape, radius, start, np.zeros(2))


def _plate(rng: np.random.Generator, moved: str) -> tuple[Layer, ...]:
    """Ground, plate and sprite, all about the middle; ``moved`` says how many of them move."""
    middle, motion = np.full(2, _MIDDLE), _motion(rng)
    layers = [
        _ground(rng), _thing(rng, rng.uniform(5.5, 7.0), middle), _thing(rng, rng.uniform(2.5, 3.5), middle)
    ]  # fmt: skip
    first = {"sprite": 2, "plate": 1, "everything": 0}[moved]
    return tuple(
        replace(layer, motion=motion, number=1) if place >= first else layer for place, layer in enumerate(layers)
    )


def _crossing(rng: np.random.Generator) -> tuple[Layer, ...]:
    """Two sprites that pass the middle of the frame at the same time, from different sides."""
    angle, layers = rng.uniform(0, 2 * np.pi), [_ground(rng)]
    if rng.random() < 0.5:
        layers = [replace(layers[0], motion=_motion(rng) / 2, number=3)]
    for number, turn in ((1, 0.0), (2, rng.uniform(np.pi / 3, 2 * np.pi / 3))):
        way = np.array([np.cos(angle + turn), np.sin(angle + turn)])
        length, middle = rng.uniform(*_CROSSING), np.full(2, _MIDDLE) + rng.uniform(-1, 1, 2)
        own = _thing(rng, rng.uniform(2.5, 3.0), middle - way * length / 2)
        layers.append(replace(own, motion=way * length, number=number))
    return tuple(layers)


_DRAWN: dict[str, Callable[[np.random.Generator], tuple[Layer, ...]]] = {
    "start": lambda rng: _plate(rng, "sprite"),
    "together": lambda rng: _plate(rng, "plate"),
    "crossing": _crossing,
    "camera": lambda rng: _plate(rng, "everything"),
}
