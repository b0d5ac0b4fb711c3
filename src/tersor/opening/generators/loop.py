"""Models that make a text and a picture a step, fed with what they made before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, TypeAlias

from tersor._errors import TersorError
from tersor.opening.generators.base import MOST_STEPS, Family
from tersor.opening.outputs import Answer
from tersor.opening.pictures import read_rgb
from tersor.opening.records import Instance

#: A text, and a picture of Pillow or None.
Turn: TypeAlias = tuple[str, Any]
#: From the input, the steps so far and a seed to the next step; None ends the answer where its length is free.
MakeStep: TypeAlias = Callable[[Sequence[Turn], Sequence[Turn], int], "Turn | None"]


class StepLoop:
    """Any unified model by one function: input and steps so far in, the next step out.

    Args:
        make_step: Makes one step; see `MakeStep`.
        name: Of the contestant.
        family: 'two_stage' if texts and pictures come from separate passes, 'end_to_end' if from one.
    """

    def __init__(self, make_step: MakeStep, *, name: str, family: Family = "end_to_end") -> None:
        self.make_step, self.name = make_step, name
        self.family: Family = family

    @classmethod
    def from_text(cls, text: str) -> StepLoop:
        """The loop over the function that ``module:function`` names; the function's name is the contestant's."""
        module, _, name = text.partition(":")
        try:
            function = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise TersorError(f"loop:{text} must name a function, such as loop:my_module:make_step ({error})") from None
        return cls(function, name=name)

    def generate(self, instance: Instance, *, n_steps: int | None, seed: int) -> Answer:
        """See `InterleavedGenerator`."""
        given = [(step.text, read_rgb(step.image) if step.image else None) for step in instance.inputs]
        made: list[Turn] = []
        while len(made) < (MOST_STEPS if n_steps is None else n_steps):
            step = self.make_step(given, tuple(made), seed + len(made))
            if step is None:
                break
            if not isinstance(step, tuple) or len(step) != 2 or not isinstance(step[0], str):
                raise TersorError(f"{self.name} must return a text and a picture, or None; it returned {type(step)}")
            made.append(step)
        return Answer(tuple(made))
