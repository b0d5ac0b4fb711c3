"""Requests in words for the experts of tiny-experts, which a router sends to one of them.

The templates share their vocabulary on purpose: "order", "letters", "alphabet", "next" and "backwards" occur for
several skills, and what decides is how they are combined. Some templates of each skill are never trained on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.experts.bench.skills import SKILLS, Example, examples

#: What the router is told of each expert.
DESCRIPTIONS = {
    "reverse": "backwards",
    "sort": "from a to z",
    "add": "sum",
    "shift": "next letters",
}

#: Commands by skill, and the frames that they are wrapped in: a template is one in the other. No router is trained on
#: what is "unseen", and none was chosen by it.
TEMPLATES: dict[str, Any] = json.loads(Path(__file__).with_name("requests.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class LabelledRequest:
    """A request in words, the skill it is for, and the prompt with its answer that it stands for."""

    text: str
    skill: str
    example: Example


def draw_requests(
    n: int, *, seed: int, unseen: bool, held_out: bool, skills: Sequence[str] = SKILLS
) -> list[LabelledRequest]:
    """``n`` requests, the skills in turn, from the templates that a router is trained on or from the ``unseen`` ones.

    Args:
        n: How many.
        seed: Of all draws.
        unseen: Whether templates are ones that no router is trained on.
        held_out: Whether words and numbers are ones that no model is trained on.
        skills: What is asked for.
    """
    kind = "unseen_" if unseen else ""
    commands, frames = TEMPLATES[f"{kind}commands"], TEMPLATES[f"{kind}frames"]
    each = -(-n // len(skills))
    drawn = {skill: examples(skill, each, seed=seed, held_out=held_out) for skill in skills}
    rng = random.Random(f"requests {seed} {unseen}")
    rows = []
    for number in range(n):
        skill = skills[number % len(skills)]
        example = drawn[skill][number // len(skills)]
        command = rng.choice(commands[skill]).format(**_parts(skill, example.prompt))
        rows.append(LabelledRequest(rng.choice(frames).format(command), skill, example))
    return rows


def _parts(skill: str, prompt: str) -> dict[str, str]:
    """What a template names of a prompt."""
    if skill == "add":
        a, b = (str(int(number[::-1])) for number in prompt.removesuffix("=").split("+"))
        return {"a": a, "b": b}
    return {"word": prompt.removesuffix(">")}
