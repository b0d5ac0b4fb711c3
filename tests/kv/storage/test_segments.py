"""Segments: what is left of them below a position is what a cache without the later tokens holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.kv.selection.base import choose_among, compact
from tersor.kv.storage.mixed import MixedPrecisionStorage
from tersor.kv.storage.segments import Segment

TOKENS, START = 12, 5


def segment(bits: tuple[int, int] = (4, 2), valid: Tensor | None = None) -> Segment:
    """Every third token in the first width, the others in the second; ``valid`` ``[2, TOKENS]`` leaves padding out."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 2, TOKENS, 8, generator=generator) for _ in range(2))
    order = torch.arange(TOKENS).expand(2, 1, -1)
    real = torch.ones(2, TOKENS, dtype=torch.bool) if valid is None else valid
    first = (order % 3 == 0) & real[:, None]
    second = (order % 3 != 0) & real[:, None]
    chosen = [compact(torch.where(each, order, TOKENS), TOKENS) for each in (first, second)]
    storage = MixedPrecisionStorage(high_bits=bits[0], low_bits=bits[1])
    return storage.encode(keys, values, (chosen[0], chosen[1]), start=START, where="a test")


def written(part: Segment | None) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and which tokens are there, by position."""
    keys, values = torch.zeros(2, 2, START + TOKENS + 1, 8), torch.zeros(2, 2, START + TOKENS + 1, 8)
    present = torch.zeros(2, 2, START + TOKENS + 1, dtype=torch.bool)
    if part is not None:
        part.scatter_into(keys, values, present)
    return keys[:, :, :-1], values[:, :, :-1], present[..., :-1]


@pytest.mark.parametrize("bits", [(4, 2), (16, 4), (8, 0)])
@pytest.mark.parametrize("limit", [*range(START, START + TOKENS + 2)])
def test_what_is_left_are_the_tokens_below_the_limit(bits: tuple[int, int], limit: int) -> None:
    whole = segment(bits)
    rest = whole.before(limit)
    full, left = written(whole), written(rest)
    kept = min(limit, START + TOKENS)
    for before, after in zip(full, left, strict=True):
        assert torch.equal(after[:, :, :kept], before[:, :, :kept])
        assert not bool(after[:, :, kept:].any())
    if rest is None:
        assert limit <= START
    else:
        assert (rest.start, rest.length) == (START, kept - START)


def test_padding_stays_away_when_tokens_are_dropped() -> None:
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    valid[1, :4] = False
    present = written(segment(valid=valid).before(START + 7))[2]
    assert present[0, 0].nonzero().flatten().tolist() == list(range(START, START + 7))
    assert present[1, 0].nonzero().flatten().tolist() == list(range(START + 4, START + 7))


def test_dropping_frees_memory() -> None:
    def held(part: Segment) -> int:
        return sum(group.keys.codes.untyped_storage().nbytes() for group in part.groups)

    whole = segment()
    rest = whole.before(START + 3)
    assert rest is not None and held(rest) < held(whole) / 2


def test_all_important_tokens_are_one_group() -> None:
    keys = values = torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(1))
    everything = choose_among(torch.ones(1, 4, dtype=torch.bool), [4])
    nothing = compact(torch.full((1, 1, 1), 4), 4)
    made = MixedPrecisionStorage().encode(keys, values, (everything, nothing), start=0, where="a test")
    assert made.groups[0].positions.flatten().tolist() == [0, 1, 2, 3]
