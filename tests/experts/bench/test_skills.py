"""The generated tasks of tiny-experts: right answers, held-out prompts, requests in words."""

from __future__ import annotations

import zlib

import pytest
import torch
from skills import solve

from tersor.experts.bench.skills import CHARACTERS, EOS, MIXTURE, PAD, SKILLS, VOCABULARY, encode, examples, rows_of


@pytest.mark.parametrize("skill", sorted({*MIXTURE, *SKILLS}))
def test_answers_are_right_and_prompts_held_out(skill: str) -> None:
    seen, unseen = (examples(skill, 300, seed=1, held_out=held_out) for held_out in (False, True))
    assert all(each.answer == solve(skill, each.prompt) for each in (*seen, *unseen))
    assert {each.prompt for each in seen}.isdisjoint(each.prompt for each in unseen)
    assert all(zlib.crc32(each.prompt.encode()) % 8 == 0 for each in unseen)
    assert examples(skill, 300, seed=1, held_out=True) == unseen != examples(skill, 300, seed=2, held_out=True)
    assert set("".join(each.prompt + each.answer for each in seen)) <= set(CHARACTERS)


def test_an_unknown_skill() -> None:
    with pytest.raises(ValueError, match="choose one of"):
        examples("divide", 1, seed=1, held_out=False)


def test_rows() -> None:
    chosen = examples("lookup", 5, seed=1, held_out=False)
    ids, wanted = rows_of(chosen)
    for row, flags, each in zip(ids, wanted, chosen, strict=True):
        length = len(each.prompt)
        assert row[:length].tolist() == encode(each.prompt)
        assert row[flags].tolist() == [*encode(each.answer), EOS]
        assert flags.nonzero()[0] == length
        assert bool((row[length + 2 :] == PAD).all())
    assert len(CHARACTERS) == len(set(CHARACTERS)) <= VOCABULARY - 3
    assert torch.tensor(encode(CHARACTERS)).max() < VOCABULARY
    assert encode("Z") == [2]
