"""What a scoreboard says of a claim: the whole interval decides, and a row of too few cases says so."""

from __future__ import annotations

from tersor.bench.measure import Estimate

#: The interval reaches what was claimed, some of it, none of it; or it is too wide to say which.
HOLDS, PARTLY, FAILS, OPEN = "holds", "partly", "fails", "too few to tell"


def judge_at_least(
    measured: Estimate,
    wanted: float,
    *,
    nothing: float | None = None,
    ahead: Estimate | None = None,
    cases: int | None = None,
    unit: float = 1.0,
) -> str:
    """The verdict on a claim that something is at least ``wanted``.

    "holds" where the whole interval is, and the simple alternative is behind with its whole interval; "fails" where
    the whole interval misses what is wanted, or, if a part of it is worth something, is ``nothing``, and where the
    alternative is clearly better; "partly" where the interval is above ``nothing`` but does not reach what is wanted,
    or reaches it beside an alternative that may be as good; "too few to tell" otherwise.

    Args:
        measured: What was measured.
        wanted: The claim, or the margin that the row states beforehand.
        nothing: What it would be without any effect, where less than the claim is worth something.
        ahead: How much better it is than the simple alternative, case by case; above 0 is better.
        cases: Over how many cases that count 0 or 1 it was measured, where none of them may have differed: resampling
            sees no spread then, and up to 3 in as many may differ elsewhere (the rule of three, 95 %).
        unit: What one case counts, for ``cases``: 100 where shares are in points.
    """
    if cases and measured.low == measured.high:
        spread = 3 * unit / cases
        measured = Estimate(measured.value, measured.low - spread, measured.high + spread, measured.interval)
    beaten = ahead is not None and ahead.high < 0
    if beaten or (measured.high < wanted if nothing is None else measured.high <= nothing):
        return FAILS
    if measured.low >= wanted:
        return HOLDS if ahead is None or ahead.low > 0 else PARTLY
    return PARTLY if nothing is not None and measured.low > nothing else OPEN


def judge_points(lost: Estimate, n: int, *, allowed: float, ahead: Estimate | None = None) -> str:
    """The verdict on a claim that ``n`` right or wrong answers lose at most ``allowed`` points; ``lost`` is below 0."""
    return judge_at_least(lost, -allowed, ahead=ahead, cases=n, unit=100)


def judge_speed_up(speed_up: Estimate, expected: float, *, least: float) -> str:
    """The verdict on a speed-up: what is wanted is a share ``least`` of what is ``expected``, and nothing is 1."""
    return judge_at_least(speed_up, least * expected, nothing=1.0)


def judge_above(measured: Estimate, other: Estimate) -> str:
    """The verdict on a claim that one of two independent measurements is larger."""
    if measured.low > other.high:
        return HOLDS
    return FAILS if measured.high < other.low else OPEN
