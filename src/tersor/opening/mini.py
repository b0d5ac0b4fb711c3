"""opening-mini: a small set of instances in OpenING's layout whose answers a program can check.

Ten kinds of tasks about scenes of coloured shapes stand for the 23 topics, two instances each. Everything follows from
the seed; the same seed gives the same bytes with the same release of Pillow (JPEG, quality 95, nothing beside pixels).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from tersor import _atomic
from tersor.opening.data import BEGIN, write_data
from tersor.opening.pictures import save_jpeg
from tersor.opening.records import Instance, Step
from tersor.opening.scenes import COLOURS, PLACES, SHAPES, Scene, describe, draw

#: A text and the scene of its picture, if it has one.
Part: TypeAlias = tuple[str, Scene | None]
#: Instructions, and what the answer shows.
Task: TypeAlias = tuple[list[Part], list[Scene]]


def write_mini(root: Path, *, seed: int = 0, each: int = 2) -> list[Instance]:
    """Write opening-mini into ``root``: ``test_data.jsonl`` and ``images/``.

    Args:
        root: Made if it is not there.
        seed: Of everything drawn.
        each: Instances of each of the 23 topics.

    Returns:
        The instances.
    """
    instances = []
    for topic, (name, kind) in enumerate(TOPICS, 1):
        for number in range(1, each + 1):
            rng = random.Random(f"{seed}:{topic}:{number}")
            inputs, answer = kind(rng)
            folder = root / "images" / name.replace(" ", "_")
            gold: list[Part] = [(f"Step {place}: {describe(scene)}.", scene) for place, scene in enumerate(answer, 1)]
            task, data_id = name.replace(" ", "_"), f"{number:03}"
            parts = {
                "inputs": _drawn(folder, f"{data_id}-i", inputs),
                "gold": _drawn(folder, f"{data_id}-o", gold),
            }
            instances.append(Instance(f"{topic:02}01{data_id}", f"{topic:02}", "01", data_id, name, task, **parts))
    write_data(root, instances)
    return instances


def _drawn(folder: Path, stem: str, parts: list[Part]) -> tuple[Step, ...]:
    steps = []
    for number, (text, scene) in enumerate(parts, 1):
        image = None
        if scene is not None:
            image = folder / f"{stem}-{number}.jpg"
            _atomic.write_bytes(image, save_jpeg(draw(scene)))
        steps.append(Step(text, image))
    return tuple(steps)


def _thing(rng: random.Random) -> tuple[str, str]:
    return rng.choice(list(COLOURS)), rng.choice(SHAPES)


def _scene(rng: random.Random, things: int) -> Scene:
    return {cell: _thing(rng) for cell in rng.sample(range(9), things)}


def story(rng: random.Random) -> Task:
    """A thing more in every picture."""
    cells = rng.sample(range(9), rng.randint(2, 4))
    things = {cell: _thing(rng) for cell in cells}
    steps = [{cell: things[cell] for cell in cells[: number + 1]} for number in range(len(cells))]
    told = "; then comes ".join(describe({cell: things[cell]}) for cell in cells)
    return [(f"Tell a story in which a thing joins with every picture.{BEGIN} At first there is {told}.", None)], steps


def guide(rng: random.Random) -> Task:
    """Every picture shows one of the places that the instruction lists."""
    steps = [_scene(rng, 1) for _ in range(rng.randint(2, 4))]
    listed = "; ".join(describe(scene) for scene in steps)
    return [(f"Guide a visitor: a step and a picture for each sight.{BEGIN} The sights: {listed}.", None)], steps


def completion(rng: random.Random) -> Task:
    """Two pictures of a growing scene; the rest is wanted."""
    cells = rng.sample(range(9), rng.randint(3, 4))
    things = {cell: _thing(rng) for cell in cells}
    scenes = [{cell: things[cell] for cell in cells[: number + 1]} for number in range(len(cells))]
    rest = " and then ".join(describe({cell: things[cell]}) for cell in cells[2:])
    begun: list[Part] = [
        (f"Go on with the picture book.{BEGIN} Page 1.", scenes[0]),
        (f"Page 2. What joins next: {rest}.", scenes[1]),
    ]
    return begun, scenes[2:]


def layout(rng: random.Random) -> Task:
    """One picture from a description."""
    scene = _scene(rng, rng.randint(2, 4))
    return [(f"Lay out a page as described, in one picture.{BEGIN} It has {describe(scene)}.", None)], [scene]


def edit(rng: random.Random) -> Task:
    """The same picture, one thing in another colour."""
    before = _scene(rng, rng.randint(1, 3))
    cell = rng.choice(list(before))
    colour = rng.choice([each for each in COLOURS if each != before[cell][0]])
    wish = f"Edit the picture, and change nothing else.{BEGIN} Paint the {before[cell][1]} {PLACES[cell]} {colour}."
    return [(wish, before)], [before | {cell: (colour, before[cell][1])}]


def mirror(rng: random.Random) -> Task:
    """The same picture seen from behind."""
    before = _scene(rng, rng.randint(1, 3))
    after = {cell // 3 * 3 + 2 - cell % 3: thing for cell, thing in before.items()}
    return [(f"Show the same from another side.{BEGIN} Left and right change places.", before)], [after]


def compose(rng: random.Random) -> Task:
    """What is in two pictures, in one."""
    one, two = rng.sample(range(9), 2)
    first, second = {one: _thing(rng)}, {two: _thing(rng)}
    return [(f"Put both things into one picture.{BEGIN} This one", first), ("and this one.", second)], [first | second]


def pattern(rng: random.Random) -> Task:
    """Two colours take turns; the next two are wanted."""
    cell, shape = rng.randrange(9), rng.choice(SHAPES)
    colours = rng.sample(list(COLOURS), 2)
    shown = [{cell: (colours[number % 2], shape)} for number in range(rng.choice((2, 3)))]
    begun: list[Part] = [(f"Continue the row by two pictures.{BEGIN} First:", shown[0])]
    begun += [("then:", scene) for scene in shown[1:]]
    return begun, [{cell: (colours[(len(shown) + number) % 2], shape)} for number in range(2)]


def counting(rng: random.Random) -> Task:
    """One thing, two things, three things."""
    thing, row, most = _thing(rng), rng.randrange(3), rng.randint(2, 3)
    wish = f"Teach counting to {most}, a picture a number.{BEGIN} Count {thing[0]} {thing[1]}s"
    rows = ("at the top", "in the middle", "at the bottom")
    steps = [{3 * row + column: thing for column in range(number + 1)} for number in range(most)]
    return [(f"{wish} in the row {rows[row]}, from the left.", None)], steps


def way(rng: random.Random) -> Task:
    """A thing goes from cell to cell."""
    thing, cells = _thing(rng), rng.sample(range(9), rng.randint(2, 4))
    wish = f"Show the way, a picture a stop.{BEGIN} It goes on to be " + ", then ".join(
        PLACES[each] for each in cells[1:]
    )
    return [(f"{wish}.", {cells[0]: thing})], [{cell: thing} for cell in cells[1:]]


#: The 23 topics, each with the kind of task that stands for it.
TOPICS: tuple[tuple[str, Callable[[random.Random], Task]], ...] = (
    ("story writing", story), ("travel guide", guide), ("storybook completion", completion),
    ("document with layout", layout), ("website pages", way), ("picture editing", edit), ("product design", layout),
    ("geometry steps", counting), ("mind map", story), ("news from many views", mirror), ("visual analogy", pattern),
    ("novel view", mirror), ("multiple concepts", compose), ("film recommendation", guide), ("brainstorming", guide),
    ("action anticipation", pattern), ("street view", way), ("social media post", story), ("dressing", edit),
    ("recipe", story), ("tutorial", counting), ("exercise plan", guide), ("navigation", way),
)  # fmt: skip
