"""The shape of the claims of `tersor tune` on the trained models. Slow: the full figures are in docs/choosing.md."""

from __future__ import annotations

import time

import pytest

from tersor import zoo
from tersor.kv.tune.pieces import cut, halves
from tersor.kv.tune.run import Tuning, tune

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# The committed tables do not use this seed.
SEED = 31


@pytest.fixture(scope="module", params=["tiny-lm", "tiny-lm-tied"])
def found(request: pytest.FixtureRequest) -> tuple[Tuning, float]:
    """What is found at 4.5x, and the seconds of one thread that it took."""
    model, tokenizer = zoo.load(request.param)
    start = time.thread_time()
    tuning = tune(model, halves(cut([zoo.book()], tokenizer, 1024), 48, SEED), 4.5)
    return tuning, time.thread_time() - start


def test_the_plan_loses_no_more_than_any_single_setting_on_pieces_held_out(found: tuple[Tuning, float]) -> None:
    chosen, *others = found[0].settings
    for other in others:
        assert chosen.held_out.mean < other.held_out.mean
        assert chosen.held_out.against(other.held_out).low <= 0.0
    assert chosen.held_out.ratio >= 4.5


def test_it_takes_less_than_three_minutes(found: tuple[Tuning, float]) -> None:
    assert found[1] < 180


def test_all_tokens_in_three_bits_lose_less_than_zipcache_at_fewer_bytes(found: tuple[Tuning, float]) -> None:
    known = {each.name: each.held_out for each in found[0].settings}
    mixed = next(own for name, own in known.items() if name.startswith("ZipCache 4/2 r=") and "+" not in name)
    assert known["uniform 3-bit"].mean < mixed.mean
    assert known["uniform 3-bit"].ratio > mixed.ratio
