"""A judge that is a program: for tests, for the demo, and for answers that can be checked."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tersor._errors import TersorError
from tersor.opening.judging.base import Question, Record, Reply
from tersor.opening.records import Instance, Label, Step
from tersor.opening.scenes import faults

#: How much better the first answer is than the second; 1 is a lean, 2 a win.
Advantage = Callable[[Instance, Sequence[Step], Sequence[Step]], float]


def fewer_faults(instance: Instance, first: Sequence[Step], second: Sequence[Step]) -> float:
    """How many faults fewer the first answer has, where instances are scenes; see `tersor.opening.scenes.faults`."""
    return faults(instance, second) - faults(instance, first)


#: Name -> judge of ``--judge scripted:NAME``.
SCRIPTS: dict[str, Advantage] = {"faults": fewer_faults}


class ScriptedJudge:
    """Decides by a function, with noise and a liking for the first place if wanted.

    Args:
        advantage: How much better the first answer is.
        name: Of the script, in its id.
        noise: Standard deviation of what is added to each advantage.
        position_bias: What is added for being shown first.
        seed: Of the noise, which is the same for the same battle and order.
    """

    def __init__(
        self, advantage: Advantage, *, name: str = "script", noise: float = 0.0, position_bias: float = 0.0,
        seed: int = 0,
    ) -> None:  # fmt: skip
        if noise < 0 or not math.isfinite(noise + position_bias):
            raise TersorError(f"noise={noise} must not be negative, and bias={position_bias} a finite number")
        self.advantage, self.noise, self.position_bias, self.seed = advantage, noise, position_bias, seed
        self.settings: dict[str, Any] = {"noise": noise, "position_bias": position_bias, "seed": seed}
        set_ = [
            f"{key}={value:g}" for key, value in (("noise", noise), ("bias", position_bias), ("seed", seed)) if value
        ]
        self.id = ",".join([f"scripted:{name}", *set_])
        self.prompt_hash = self.prompt_text = ""

    @classmethod
    def from_text(cls, text: str) -> ScriptedJudge:
        """The judge of ``NAME[,noise=N][,bias=N][,seed=N]``."""
        name, *settings = text.split(",")
        if name not in SCRIPTS:
            raise TersorError(f"scripted judge {name!r} must be one of {', '.join(SCRIPTS)}")
        values = {"noise": 0.0, "bias": 0.0, "seed": 0.0}
        for each in settings:
            key, _, value = each.partition("=")
            try:
                values[key] = (values[key], float(value))[1]
            except (KeyError, ValueError):
                raise TersorError(f"{each!r} of scripted judge {name} must be noise=N, bias=N or seed=N") from None
        return cls(
            SCRIPTS[name], name=name, noise=values["noise"], position_bias=values["bias"], seed=int(values["seed"])
        )

    def decide(self, question: Question) -> Label:
        """The label of one question."""
        value = self.advantage(question.instance, question.first, question.second) + self.position_bias
        if self.noise:
            value += random.Random(f"{self.seed}:{question.battle.id}:{question.order}").gauss(0, self.noise)
        if abs(value) >= 2:
            return "A" if value > 0 else "B"
        if abs(value) >= 0.25:
            return "Tie(A)" if value > 0 else "Tie(B)"
        return "Tie"

    def run(self, questions: Iterator[Question], record: Record) -> None:
        """See `tersor.opening.judging.base.Judge`."""
        for question in questions:
            label = self.decide(question)
            record(question, Reply("ok", label, text=label))

    def remarks(self) -> list[str]:
        """See `tersor.opening.judging.base.Judge`."""
        return []
