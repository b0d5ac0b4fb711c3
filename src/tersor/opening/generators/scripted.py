"""Generators that are programs: the gold answer as a contestant, and scenes with faults at known rates."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from tersor._errors import TersorError
from tersor._lazy import require
from tersor.opening.generators.base import Family
from tersor.opening.outputs import Answer
from tersor.opening.pictures import read_rgb
from tersor.opening.records import Instance
from tersor.opening.scenes import COLOURS, SIDE, Scene, draw, told


class GoldGenerator:
    """The gold answer, as the contestant ``Human``.

    Args:
        name: Of the contestant.
    """

    family: Family = "human"

    def __init__(self, name: str = "Human") -> None:
        self.name = name

    def generate(self, instance: Instance, *, n_steps: int | None, seed: int) -> Answer:
        """See `InterleavedGenerator`."""
        steps = instance.gold[:n_steps]
        return Answer(tuple((step.text, read_rgb(step.image) if step.image else None) for step in steps))


@dataclass(frozen=True, kw_only=True)
class ScriptedGenerator:
    """The gold answer of scenes with faults, so that the order of several is known.

    Args:
        name: Of the contestant.
        p_wrong_colour: Probability of each thing to be drawn in another colour.
        p_missing_step: Of the answer to end before each step.
        p_missing_image: Of each step to have no picture.
        noise: Standard deviation of what is added to every pixel, of 255.
        verbosity: Sentences of no content after each text.
    """

    name: str
    p_wrong_colour: float = 0.0
    p_missing_step: float = 0.0
    p_missing_image: float = 0.0
    noise: float = 0.0
    verbosity: int = 0
    family: Family = "scripted"

    def __post_init__(self) -> None:
        for field in ("p_wrong_colour", "p_missing_step", "p_missing_image"):
            if not 0 <= getattr(self, field) <= 1:
                raise TersorError(f"{field}={getattr(self, field)} must be from 0 to 1")
        if self.noise < 0 or self.verbosity < 0:
            raise TersorError(f"noise={self.noise} and verbosity={self.verbosity} must not be negative")

    def generate(self, instance: Instance, *, n_steps: int | None, seed: int) -> Answer:
        """See `InterleavedGenerator`.

        Raises:
            TersorError: If the instance is not about scenes.
        """
        rng = random.Random(f"{seed}:{self.name}:{instance.uid}")
        steps: list[tuple[str, Any]] = []
        for step in instance.gold[:n_steps]:
            if not (scene := told(step.text)):
                raise TersorError(
                    f"instance {instance.uid} is not about scenes; scripted generators answer opening-mini"
                )
            if steps and rng.random() < self.p_missing_step:
                break
            text = step.text + " It is a nice picture." * self.verbosity
            picture = None if rng.random() < self.p_missing_image else self._picture(scene, rng)
            steps.append((text, picture))
        return Answer(tuple(steps))

    def _picture(self, scene: Scene, rng: random.Random) -> Any:
        drawn = {}
        for cell, (colour, shape) in scene.items():
            if rng.random() < self.p_wrong_colour:
                colour = rng.choice([each for each in COLOURS if each != colour])
            drawn[cell] = (colour, shape)
        picture = draw(drawn)
        if not self.noise:
            return picture
        values = (min(255, max(0, round(value + rng.gauss(0, self.noise)))) for value in picture.tobytes())
        return require("PIL.Image", "arena").frombytes("RGB", (SIDE, SIDE), bytes(values))


#: Generators of a known order, after the gold answer.
LADDER = (
    ScriptedGenerator(name="strong", p_wrong_colour=0.05, p_missing_image=0.02),
    ScriptedGenerator(name="medium", p_wrong_colour=0.3, p_missing_step=0.1, p_missing_image=0.1),
    ScriptedGenerator(name="weak", p_wrong_colour=0.6, p_missing_step=0.4, p_missing_image=0.4, verbosity=2),
)
