"""What is to move, and where: entities with masks and paths, and the files that they are kept in."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tersor import _atomic
from tersor._errors import TersorError
from tersor._images import opened
from tersor._lazy import require
from tersor.drag.paths import frame_points, point_times

#: Where a path is taken to be: at the entity's centre whatever its first point, or at the points themselves.
ANCHORS = ("center", "path")


@dataclass(frozen=True)
class Circle:
    """The largest circle in a mask, within the frame.

    Args:
        x: Column of its centre, in pixels.
        y: Row of its centre.
        radius: In whole pixels, as the authors' code has it.
    """

    x: float
    y: float
    radius: int


@dataclass(frozen=True, eq=False)
class Entity:
    """One thing to move.

    Args:
        mask: Bool ``[height, width]`` of the first frame.
        path: ``[points, 2]``, (x, y) in pixels, origin in the upper left corner.
        name: In messages and files.
        anchor: ``"center"`` takes the path as a displacement of the entity's centre, as in training; ``"path"`` puts
            the control at the points themselves.
        timing: See `tersor.drag.paths.frame_points`.

    Raises:
        TersorError: If a part is not as it should be; the message names the entity.
    """

    mask: Any
    path: Any
    name: str = "entity"
    anchor: str = "center"
    timing: str | Sequence[float] = "uniform"

    def __post_init__(self) -> None:
        mask = np.asarray(self.mask)
        if mask.ndim != 2 or not (mask.dtype == bool or set(np.unique(mask)) <= {0, 1}):
            raise self.wrong(
                f"mask must be true or false for each pixel, [height, width]; got {mask.dtype} {mask.shape}"
            )
        if not mask.any():
            raise self.wrong("mask is empty; it needs a pixel at least")
        try:
            path = np.asarray(self.path, dtype=float)
        except (TypeError, ValueError):
            path = np.empty(0)
        if path.ndim != 2 or path.shape[1:] != (2,) or not len(path) or not np.isfinite(path).all():
            raise self.wrong("path must be (x, y) points in pixels, one at least")
        if self.anchor not in ANCHORS:
            raise self.wrong(f"anchor={self.anchor!r} must be one of {ANCHORS}")
        try:
            point_times(path, self.timing)
        except TersorError as error:
            raise self.wrong(str(error)) from None
        object.__setattr__(self, "mask", mask.astype(bool))
        object.__setattr__(self, "path", path)

    def wrong(self, what: str) -> TersorError:
        """An error that names the entity."""
        return TersorError(f"entity {self.name!r}: {what}")

    def circle(self, most: float = float("inf")) -> Circle:
        """The largest circle in the mask; its radius at most ``most`` pixels (paper, section 3.3)."""
        column, row, radius = self._largest
        return Circle(column, row, int(min(radius, most)))

    @cached_property
    def _largest(self) -> tuple[float, float, float]:
        """Column, row and radius; asked for by each map and each path."""
        ndimage: Any = require("scipy.ndimage", "drag")
        # What lies outside the frame is outside the mask.
        distance = ndimage.distance_transform_edt(np.pad(self.mask, 1))[1:-1, 1:-1]
        row, column = np.unravel_index(distance.argmax(), distance.shape)
        return float(column), float(row), float(distance.max())

    def centers(self, num_frames: int) -> np.ndarray:
        """Where its control is in each frame, ``[num_frames, 2]``."""
        points = frame_points(self.path, num_frames, self.timing)
        if self.anchor == "path":
            return points
        circle = self.circle()
        found: np.ndarray = np.array([circle.x, circle.y]) + points - points[0]
        return found


@dataclass(frozen=True, eq=False)
class Scene:
    """Entities of one picture, in the order in which they were given.

    Args:
        width: Of the picture in pixels.
        height: Of the picture.
        num_frames: Frames of the video.
        entities: One at least.

    Raises:
        TersorError: If sizes are below 1, there is no entity, or a mask has another size; the message names it.
    """

    width: int
    height: int
    num_frames: int
    entities: tuple[Entity, ...]

    def __post_init__(self) -> None:
        for name in ("width", "height", "num_frames"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise TersorError(f"{name}={value!r} must be a whole number from 1")
        if not self.entities:
            raise TersorError("a scene needs an entity at least")
        for each in self.entities:
            if each.mask.shape != (self.height, self.width):
                raise each.wrong(f"mask is {each.mask.shape}, the scene {(self.height, self.width)} (height, width)")

    def resized(self, width: int, height: int) -> Scene:
        """The same scene on a picture of another size; a pixel of a mask is true where most of it was."""
        if (width, height) == (self.width, self.height):
            return self
        factors = np.array([width / self.width, height / self.height])
        made = []
        for each in self.entities:
            share = area_resized(each.mask, height, width)
            mask = share >= 0.5 if (share >= 0.5).any() else share >= share.max()  # a thin one does not vanish
            made.append(replace(each, mask=mask, path=each.path * factors))
        return Scene(width, height, self.num_frames, tuple(made))

    @classmethod
    def load(cls, file: str | Path, *, num_frames: int | None = None) -> Scene:
        """Read what `save` wrote, or the authors' ``demo.json``, whose masks lie beside it.

        Args:
            file: The JSON file.
            num_frames: Another number of frames than the file says.

        Raises:
            TersorError: Naming the file and what is wrong in it.
        """
        file = Path(file)
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError:
            raise TersorError(f"{file}: no such scene") from None
        except (ValueError, RecursionError) as error:
            raise TersorError(f"{file} is no JSON: {error}") from None
        if not isinstance(values, dict) or not values:
            raise TersorError(f"{file} holds no scene; it needs width, height, num_frames and entities")
        try:
            if "entities" not in values:
                return _of_demo(values, file.parent, num_frames)
            entities = tuple(_entity(each, file.parent) for each in values["entities"])
            return cls(values["width"], values["height"], num_frames or values["num_frames"], entities)
        except TersorError as error:
            raise TersorError(f"{file}: {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise TersorError(f"{file} holds no whole scene: {type(error).__name__} {error}") from None

    def save(self, file: str | Path) -> None:
        """Write a JSON file, and the masks as PNG files beside it."""
        file = Path(file)
        image: Any = require("PIL.Image", "drag")
        listed = []
        for number, each in enumerate(self.entities):
            name = f"{file.stem}_mask_{number}.png"
            written = io.BytesIO()
            image.fromarray(each.mask.astype(np.uint8) * 255).save(written, "PNG")
            _atomic.write_bytes(file.parent / name, written.getvalue())
            timing = each.timing if isinstance(each.timing, str) else list(each.timing)
            listed.append(
                {"name": each.name, "mask": name, "path": each.path.tolist(), "anchor": each.anchor, "timing": timing}
            )
        facts = {"width": self.width, "height": self.height, "num_frames": self.num_frames, "entities": listed}
        _atomic.write_text(file, json.dumps(facts, indent=1) + "\n")


def area_resized(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """How much of each new pixel a mask covers, float32 ``[height, width]``."""
    import torch

    resized = torch.nn.functional.interpolate(torch.from_numpy(mask).float()[None, None], (height, width), mode="area")
    found: np.ndarray = resized[0, 0].numpy()
    return found


def _entity(values: dict[str, Any], folder: Path) -> Entity:
    known = {name: values[name] for name in ("name", "anchor", "timing") if name in values}
    return Entity(_mask(folder / values["mask"]), values["path"], **known)


def _of_demo(values: dict[str, Any], folder: Path, num_frames: int | None) -> Scene:
    """The authors' format: ``{"1": {"mask_name": ..., "trajectory": [[x, y], ...]}}``, anchored at the path."""
    entities = tuple(
        Entity(_mask(folder / each["mask_name"]), each["trajectory"], each.get("comment") or f"entity {key}", "path")
        for key, each in values.items()
    )
    height, width = entities[0].mask.shape
    return Scene(width, height, num_frames or max(len(each.path) for each in entities), entities)


def _mask(file: Path) -> np.ndarray:
    with opened(file, extra="drag") as picture:
        found: np.ndarray = np.asarray(picture.convert("L")) > 127
    return found
