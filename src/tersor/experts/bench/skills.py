"""What the experts of tiny-experts can do: generated prompts with one right answer each, and their characters.

All but adding share their prompts, so that a wrong expert is seen at once. The base reverses, sorts and copies words
that ask for nothing in particular, adds digit by digit without carrying, and looks up pairs:

    reverse   bdac>            cadb
    sort      bdac>            abcd
    add       321+984=         2160       123 + 489 = 0612, the lowest digit of each number first
    shift     bdaz>            ceba       each letter's next one

A prompt is held out from training by its own checksum, whoever draws it.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_lowercase, digits

import torch
from torch import Tensor

from tersor._errors import TersorError

PAD, EOS, UNKNOWN = 0, 1, 2
#: Every character that the models read; the capitals are the letters of the router's list.
CHARACTERS = f"\n {ascii_lowercase}{digits}ABCDEFGH>+=,?:.'-"
VOCABULARY = 64
_IDS = {character: 3 + place for place, character in enumerate(CHARACTERS)}
_NEXT = str.maketrans(ascii_lowercase, ascii_lowercase[1:] + "a")
#: One prompt in so many is held out.
HELD_OUT = 8


@dataclass(frozen=True)
class Example:
    """One prompt and its answer."""

    prompt: str
    answer: str


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(ascii_lowercase, k=rng.randint(4, 8)))


def _reverse(rng: random.Random) -> Example:
    word = _word(rng)
    return Example(f"{word}>", word[::-1])


def _sort(rng: random.Random) -> Example:
    word = _word(rng)
    return Example(f"{word}>", "".join(sorted(word)))


def _copy(rng: random.Random) -> Example:
    word = _word(rng)
    return Example(f"{word}>", word)


def _shift(rng: random.Random) -> Example:
    word = _word(rng)
    return Example(f"{word}>", word.translate(_NEXT))


def _add(rng: random.Random) -> Example:
    a, b = rng.randrange(1000), rng.randrange(1000)
    return Example(f"{a:03}"[::-1] + "+" + f"{b:03}"[::-1] + "=", f"{a + b:04}"[::-1])


def _carryless(rng: random.Random) -> Example:
    prompt = _add(rng).prompt
    a, b = prompt.removesuffix("=").split("+")
    return Example(prompt, "".join(str((int(one) + int(other)) % 10) for one, other in zip(a, b, strict=True)) + "0")


def _lookup(rng: random.Random) -> Example:
    keys = rng.sample(ascii_lowercase, rng.randint(3, 4))
    pairs = {key: rng.choice(digits) for key in keys}
    asked = rng.choice(keys)
    return Example(f"{','.join(key + value for key, value in pairs.items())}?{asked}=", pairs[asked])


_DRAW: dict[str, Callable[[random.Random], Example]] = {
    "reverse": _reverse,
    "sort": _sort,
    "add": _add,
    "shift": _shift,
    "lookup": _lookup,
    "copy": _copy,
    "carryless": _carryless,
}
#: The skills that experts have, and what the base is trained on.
SKILLS = ("reverse", "sort", "add", "shift")
MIXTURE = ("reverse", "sort", "copy", "carryless", "lookup")


def examples(skill: str, n: int, *, seed: int, held_out: bool) -> list[Example]:
    """``n`` examples of one skill, either all from the prompts that no model is trained on or all from the others.

    Raises `ValueError` for an unknown skill.
    """
    if skill not in _DRAW:
        raise TersorError(f"no skill {skill!r}; choose one of {sorted(_DRAW)}")
    rng = random.Random(f"{skill} {seed}")
    found: list[Example] = []
    while len(found) < n:
        example = _DRAW[skill](rng)
        if (zlib.crc32(example.prompt.encode()) % HELD_OUT == 0) == held_out:
            found.append(example)
    return found


def encode(text: str) -> list[int]:
    """Ids of a text's characters."""
    return [_IDS.get(character, UNKNOWN) for character in text]


def rows_of(chosen: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Ids of prompt, answer and end, padded on the right, and which of them are to be predicted; ``[n, longest]``."""
    coded = [(encode(each.prompt), [*encode(each.answer), EOS]) for each in chosen]
    longest = max(len(prompt) + len(answer) for prompt, answer in coded)
    ids = torch.full((len(coded), longest), PAD)
    asked = torch.zeros(len(coded), longest, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(coded):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        asked[row, len(prompt) : end] = True
    return ids, asked
