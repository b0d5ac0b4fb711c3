"""The limit of open requests: never exceeded, halved once a round, one more after twenty that went well."""

from __future__ import annotations

import asyncio

from tersor.opening.judging.limiter import Limiter


def test_no_more_are_open_than_allowed_and_a_smaller_limit_holds_at_once() -> None:
    async def run() -> list[int]:
        limiter, seen = Limiter(5), []

        async def work(number: int) -> None:
            async with limiter.slot() as began:
                seen.append(limiter.open)
                assert limiter.open <= limiter.limit
                await asyncio.sleep(0.001)
                if number == 12:
                    limiter.throttled(began)
                    while limiter.open > limiter.limit:  # those that were open before end by themselves
                        await asyncio.sleep(0.001)

        await asyncio.gather(*(work(number) for number in range(40)))
        assert limiter.open == 0
        return seen

    seen = asyncio.run(run())
    assert max(seen) == 5 and max(seen[-10:]) == 2


def test_requests_of_one_round_halve_the_limit_once() -> None:
    async def run() -> Limiter:
        limiter = Limiter(16)
        async with limiter.slot() as one, limiter.slot() as two:
            limiter.throttled(one)
            limiter.throttled(two)
        assert limiter.limit == 8
        async with limiter.slot() as three:
            limiter.throttled(three)
        return limiter

    limiter = asyncio.run(run())
    assert limiter.limit == 4
    for _ in range(19):
        limiter.succeeded()
    assert limiter.limit == 4
    for _ in range(1 + 20 * 30):
        limiter.succeeded()
    assert limiter.limit == 16


def test_the_limit_never_falls_below_one() -> None:
    async def run() -> int:
        limiter = Limiter(2)
        for _ in range(5):
            async with limiter.slot() as began:
                limiter.throttled(began)
        return limiter.limit

    assert asyncio.run(run()) == 1
