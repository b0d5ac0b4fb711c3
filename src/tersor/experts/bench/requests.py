"""Requests in words for the experts of tiny-experts, which a router sends to one of them.

The templates share their vocabulary on purpose: "order", "letters", "alphabet", "next" and "backwards" occur for
several skills, and what decides is how they are combined. Some templates of each skill are never trained on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tersor.experts.bench.skills import SKILLS, Example, examples

#: What the router is told of each expert.
DESCRIPTIONS = {
    "reverse": "backwards",
    "sort": "from a to z",
    "add": "sum",
    "shift": "next letters",
}

#: What is asked for, in the form of a command, and how a command is wrapped: a template is one in the other.
_COMMANDS: dict[str, tuple[str, ...]] = {
    "reverse": (
        "write {word} backwards",
        "reverse the word {word}",
        "reverse the letters of {word}",
        "spell {word} from the last letter to the first",
        "spell {word} from its end",
        "turn the letters of {word} around",
        "read {word} from right to left",
        "put the letters of {word} in reverse order",
        "flip the word {word}",
        "write {word} back to front",
        "start at the end of {word} and go back to its first letter",
        "list the letters of {word} backwards, the last one first",
        "turn the order of the letters in {word} around",
        "do not sort {word} but reverse it",
        "write {word} not in alphabetical order but backwards",
        "take {word} and write it the other way around",
        "give {word} back in reverse",
        "show the letters in {word} in reverse",
        "type the word {word} backwards",
        "say the letters of {word} from the last one to the first one",
        "go through {word} from the last letter to the first",
        "read out {word} back to front",
        "copy {word} in reverse order",
        "write down {word} from the end",
    ),
    "sort": (
        "sort the letters of {word}",
        "sort the word {word}",
        "put the letters of {word} in alphabetical order",
        "write the letters of {word} from a to z",
        "list the letters of {word} in the order of the alphabet",
        "arrange {word} alphabetically",
        "order the letters in {word}, a first and z last",
        "write {word} with its letters in order",
        "bring the letters of {word} into alphabetical order",
        "take {word} and sort it from a to z",
        "rank the letters in {word} by the alphabet",
        "write the letters of {word} as the alphabet orders them",
        "do not reverse {word} but sort it",
        "write {word} not backwards but alphabetically",
        "turn {word} into a word with sorted letters",
        "go through the alphabet and list the letters that {word} has",
        "give the letters in {word} from a to z",
        "show {word} in alphabetical order",
        "type the letters of {word} alphabetically",
        "put the letters in {word} into the order of the alphabet",
        "arrange the word {word} in alphabetical order",
        "say the letters of {word} in the order of the alphabet",
        "copy {word} with its letters from a to z",
        "write down {word} in the order that the alphabet has",
    ),
    "add": (
        "add {a} and {b}",
        "add the numbers {a} and {b}",
        "give me the sum of {a} and {b}",
        "tell me what {a} plus {b} is",
        "work out {a} + {b}",
        "compute the total of {a} and {b}",
        "find the sum of the numbers {a} and {b}",
        "take {a} and add {b}",
        "put {a} and {b} together into one number",
        "count {b} on from {a}",
        "go {b} further than the number {a}",
        "write the number that is {b} more than {a}",
        "list the total of {a} and {b}",
        "say how much {a} and {b} are together",
        "do not write {a} backwards but add {b} to it",
        "turn {a} and {b} into their sum",
        "give the sum of the numbers {a} and {b}",
        "show what {a} and {b} are in all",
        "say what {a} plus {b} makes",
        "write down {a} plus {b}",
    ),
    "shift": (
        "replace each letter of {word} by the next one",
        "write the next letter for each one in {word}",
        "shift the letters of {word} by one",
        "shift the word {word}",
        "move each letter of {word} one on in the alphabet",
        "write {word} with each letter one further",
        "take the letter after each one in {word}",
        "turn each letter of {word} into the one that follows it",
        "go one letter further in the alphabet for each one in {word}",
        "encode {word} with the letters that come next",
        "list the letters that follow those of {word} in the alphabet",
        "do not sort {word} but shift it",
        "write {word} not backwards but one letter further",
        "advance the letters of {word} by one",
        "put the next letter of the alphabet for each letter of {word}",
        "count one on from each letter of {word}",
        "give the letter that follows each one in {word}",
        "show {word} shifted by one letter",
        "type the next letter for every letter of {word}",
        "move the letters of {word} on by one",
        "replace every letter in {word} by the one after it",
        "say the letters after those in {word}",
        "copy {word} one letter further on",
        "write down the letters that follow in {word}",
    ),
}
_FRAMES = (
    "{}", "please {}", "{} please", "now {}", "could you {}?", "i would like you to {}", "you should {}", "next, {}",
    "{} for me", "i need you to {}", "let us {}", "try to {}", "what is it if you {}?", "{} and tell me the result",
    "my task is to {}", "{}, if you can", "how does one {}?", "the question is to {}. answer it", "hello, {}",
)  # fmt: skip
#: Commands and frames that no router is trained on, and by which none was chosen.
_UNSEEN: dict[str, tuple[str, ...]] = {
    "reverse": (
        "put {word} back to front",
        "list {word} from the last letter to the first",
        "show the word {word} in reverse order",
        "say {word} backwards",
    ),
    "sort": (
        "list the letters in {word} alphabetically",
        "write {word} in the order of the alphabet",
        "show the letters of {word} sorted from a to z",
        "bring {word} into alphabetical order",
    ),
    "add": (
        "say what the sum of {a} and {b} is",
        "add {b} to {a}",
        "work out the total of {a} and {b}",
        "show me {a} plus {b}",
    ),
    "shift": (
        "write the letters that come after those in {word}",
        "move every letter in {word} one further",
        "give {word} with each letter replaced by the next one",
        "shift every letter of {word} on by one",
    ),
}
_UNSEEN_FRAMES = ("would you {}?", "{} now", "all you have to do is {}", "tell me what comes out if you {}")


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
    commands, frames = (_UNSEEN, _UNSEEN_FRAMES) if unseen else (_COMMANDS, _FRAMES)
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
