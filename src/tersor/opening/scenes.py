"""Scenes of coloured shapes: drawn, told in words, and recognized again, so that a program can check an answer."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tersor._lazy import require
from tersor.opening.pictures import read_rgb
from tersor.opening.records import Instance, Step

COLOURS = {
    "red": (200, 30, 30), "green": (30, 150, 50), "blue": (40, 70, 200),
    "yellow": (235, 200, 30), "purple": (130, 50, 160), "orange": (240, 120, 20),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
#: Cells of the three rows, row by row.
PLACES = (
    "at the top left", "at the top", "at the top right", "on the left", "in the middle", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
#: Cell -> colour and shape.
Scene: TypeAlias = dict[int, tuple[str, str]]

_CELL = 32
#: Pixels of a side.
SIDE = 3 * _CELL
_PAPER = (248, 248, 244)
_MARGIN = 4
_ANY_PLACE = "|".join(sorted(PLACES, key=len, reverse=True))
_THING = re.compile(rf"\ban? (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)}) (?P<place>{_ANY_PLACE})")
#: Mean deviation of a channel from the paper, above which a picture counts as noisy.
_NOISY = 6.0


def describe(scene: Scene) -> str:
    """The scene in words, cell by cell."""
    things = [
        f"{'an' if colour == 'orange' else 'a'} {colour} {shape} {PLACES[cell]}"
        for cell, (colour, shape) in sorted(scene.items())
    ]
    return " and ".join(things)


def told(text: str) -> Scene:
    """The scene that a text tells of; empty where it tells of none."""
    return {PLACES.index(each["place"]): (each["colour"], each["shape"]) for each in _THING.finditer(text)}


def draw(scene: Scene) -> Any:
    """The scene as a picture; the same scene gives the same pixels."""
    picture = require("PIL.Image", "arena").new("RGB", (SIDE, SIDE), _PAPER)
    pen = require("PIL.ImageDraw", "arena").Draw(picture)
    for cell, (colour, shape) in scene.items():
        left, top = cell % 3 * _CELL + _MARGIN, cell // 3 * _CELL + _MARGIN
        right, bottom = left + _CELL - 2 * _MARGIN - 1, top + _CELL - 2 * _MARGIN - 1
        if shape == "circle":
            pen.ellipse((left, top, right, bottom), fill=COLOURS[colour])
        elif shape == "square":
            pen.rectangle((left, top, right, bottom), fill=COLOURS[colour])
        else:
            pen.polygon(((left, bottom), (right, bottom), ((left + right) // 2, top)), fill=COLOURS[colour])
    return picture


def seen(picture: Any) -> tuple[Scene, float]:
    """The scene in a picture, and how far its paper is from plain: the mean deviation of a channel."""
    picture = picture.convert("RGB").resize((SIDE, SIDE))
    scene, far, count = Scene(), 0.0, 0
    for cell in range(9):
        left, top = cell % 3 * _CELL, cell // 3 * _CELL
        for corner in ((1, 1), (_CELL - 2, 1), (1, _CELL - 2), (_CELL - 2, _CELL - 2)):
            pixel = picture.getpixel((left + corner[0], top + corner[1]))
            far += sum(abs(one - other) for one, other in zip(pixel, _PAPER, strict=True)) / 3
            count += 1
        colour = _colour(picture, left + _CELL // 2, top + _CELL // 2 + 2)
        if colour is not None:
            inside = _MARGIN + 2
            above = _colour(picture, left + inside, top + inside) is not None
            below = _colour(picture, left + inside, top + _CELL - inside) is not None
            scene[cell] = (colour, "square" if above else "triangle" if below else "circle")
    return scene, far / count


def faults(instance: Instance, answer: Sequence[Step]) -> float:
    """What is wrong with an answer to an instance of scenes, against the gold answer.

    A step that is missing counts 3, a picture that is missing 2, each thing that is wrong in a text or picture 1,
    a step too many 1, a noisy picture a half.
    """
    wrong = float(max(0, len(answer) - len(instance.gold)))
    for number, gold in enumerate(instance.gold):
        if number >= len(answer):
            wrong += 3
            continue
        wanted = told(gold.text)
        wrong += _differences(wanted, told(answer[number].text))
        if (file := answer[number].image) is None:
            wrong += 2
            continue
        scene, noise = _seen_in(file, file.stat().st_mtime_ns)
        wrong += _differences(wanted, scene) + (0.5 if noise > _NOISY else 0)
    return wrong


@functools.lru_cache(maxsize=4096)
def _seen_in(file: Path, changed: int) -> tuple[Scene, float]:
    """What is seen in a file; each answer is compared many times."""
    return seen(read_rgb(file))


def _differences(wanted: Scene, found: Scene) -> int:
    return sum(wanted.get(cell) != found.get(cell) for cell in wanted.keys() | found.keys())


def _colour(picture: Any, x: int, y: int) -> str | None:
    """The colour around a pixel, None for paper."""
    pixels = [picture.getpixel((x + dx, y + dy)) for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
    mean = [sum(channel) / len(pixels) for channel in zip(*pixels, strict=True)]

    def distance(other: tuple[int, int, int]) -> float:
        return float(sum((one - two) ** 2 for one, two in zip(mean, other, strict=True)))

    nearest = min(COLOURS, key=lambda name: distance(COLOURS[name]))
    return nearest if distance(COLOURS[nearest]) < distance(_PAPER) else None
