from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from arena_verdicts import NAMES, STRENGTHS, drawn, exchanged, roamed, verdict

from tersor._errors import TersorError
from tersor.opening.agreement import kendall
from tersor.opening.fits import Encoding, Fit, fit_strengths
from tersor.opening.ranking import METRICS, rate, tallies
from tersor.opening.records import Verdict

TRUE = {name: theta - statistics.fmean(STRENGTHS) for name, theta in zip(NAMES, STRENGTHS, strict=True)}


def fitted(verdicts: list[Verdict], **options: object) -> Fit:
    found = fit_strengths(verdicts, **options)  # type: ignore[arg-type]
    assert found is not None
    return found


def covered(fit: Fit) -> list[bool]:
    intervals = {name: fit.of(name).theta for name in NAMES}
    return [t is not None and t.low <= TRUE[name] <= t.high for name, t in intervals.items()]


def tau(fit: Fit) -> float:
    order = [NAMES.index(each.model) for each in fit.strengths]
    signs = [1 if a < b else -1 for place, b in enumerate(order) for a in order[:place]]
    return sum(signs) / len(signs)


#: Instances of the 56 tasks of the benchmark's test split; and of shorter runs.
TEST_SPLIT = (*[40] * 51, *[20] * 3, *[30] * 2)
SPLITS = {2160: TEST_SPLIT, 500: (10,) * 50, 150: (3,) * 50}


def recovery(seed: int, instances: int) -> tuple[float, list[bool], float, bool]:
    """Kendall's tau, which intervals cover the truth, mean squared error, and whether the best is first."""
    fit = fitted(roamed(seed, SPLITS[instances]))
    errors = [(fit.of(name).theta.value - TRUE[name]) ** 2 for name in NAMES]  # type: ignore[union-attr]
    return tau(fit), covered(fit), statistics.fmean(errors), fit.strengths[0].model == NAMES[0]


def test_strengths_are_recovered_and_covered() -> None:
    runs = [recovery(seed, 2160) for seed in range(6)]
    assert statistics.fmean(run[0] for run in runs) > 0.9
    assert statistics.fmean(hit for run in runs for hit in run[1]) > 0.87
    assert math.sqrt(statistics.fmean(run[2] for run in runs)) < 0.1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("instances", "least_tau"), [(2160, 0.94), (500, 0.88), (150, 0.77)])
def test_two_hundred_runs_recover_the_ranking(instances: int, least_tau: float) -> None:
    runs = [recovery(seed, instances) for seed in range(200)]
    coverage = statistics.fmean(hit for run in runs for hit in run[1])
    error = math.sqrt(statistics.fmean(run[2] for run in runs))
    told = [statistics.fmean(run[0] for run in runs), min(run[0] for run in runs), coverage, error]
    print(instances, *(f"{each:.3f}" for each in told), statistics.fmean(run[3] for run in runs))
    assert told[0] >= least_tau
    assert 0.92 <= coverage <= 0.975
    if instances == 2160:
        assert told[1] >= 0.85 and error < 0.085 and statistics.fmean(run[3] for run in runs) >= 0.95


@pytest.mark.parametrize("encoding", ["fdt", "half", "decisive"])
def test_the_solution_is_one_and_equals_an_independent_logistic_regression(encoding: Encoding) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    verdicts = drawn(3, 300, ties=0.6, first=0.3)
    fit = fitted(verdicts, encoding=encoding)
    assert fit.gradient < 1e-6
    value = {
        "A": 1.0,
        "B": 0.0,
        "Tie(A)": 1.0 if encoding == "fdt" else 0.5,
        "Tie(B)": 0.0 if encoding == "fdt" else 0.5,
    }
    rows = [v for v in verdicts if encoding != "decisive" or v.label in ("A", "B")]
    x = np.array([[(v.a == n) - float(v.b == n) for n in NAMES[1:]] + [1.0] for v in rows])  # all were shown a first
    y = np.array([value[v.label] for v in rows])

    def loss(beta: np.ndarray) -> float:
        eta = x @ beta
        return float(np.sum(np.log1p(np.exp(-np.abs(eta))) + np.maximum(eta, 0) - y * eta))

    beta = optimize.minimize(loss, np.zeros(x.shape[1]), method="BFGS", options={"gtol": 1e-7}).x
    theta = np.concatenate([[0], beta[:-1]]) - np.mean([0, *beta[:-1]])
    found = [fit.of(name).theta.value for name in NAMES]  # type: ignore[union-attr]
    assert found == pytest.approx(list(theta), abs=1e-4)
    assert fit.first is not None and fit.first.value == pytest.approx(beta[-1], abs=1e-4)


@pytest.mark.parametrize("encoding", ["fdt", "half", "decisive", "davidson"])
def test_who_is_called_a_changes_nothing(encoding: Encoding) -> None:
    verdicts = [*drawn(4, 100, ties=0.6, first=0.2), verdict("x", NAMES[0], NAMES[1], "Tie", first=NAMES[0])]
    one, other = fitted(verdicts, encoding=encoding), fitted(exchanged(verdicts)[::-1], encoding=encoding)
    assert one == other, "to the last bit"


def test_the_sandwich_and_the_bootstrap_agree() -> None:
    verdicts = drawn(5, 150, strengths=STRENGTHS[1:6])
    one, other = fitted(verdicts), fitted(verdicts, bootstrap=100)
    for name in NAMES[:5]:
        a, b = one.of(name).theta, other.of(name).theta
        assert a is not None and b is not None and a.value == b.value
        assert (b.high - b.low) / (a.high - a.low) == pytest.approx(1, abs=0.3)


def test_battles_on_one_instance_are_one_case() -> None:
    verdicts = drawn(6, 300)
    four = [verdict(each.uid, each.a, each.b, each.label, first=each.first) for each in verdicts for _ in range(4)]
    one, copies = fitted(verdicts).of(NAMES[3]).theta, fitted(four).of(NAMES[3]).theta
    assert one is not None and copies == pytest.approx(one, abs=1e-4)


def test_a_model_that_is_always_shown_first_is_not_carried_up() -> None:
    verdicts = drawn(7, first=0.93, weakest_first=True)
    with_term, without = fitted(verdicts), fitted(verdicts, position=False)
    last = NAMES[-1]
    assert with_term.first is not None and with_term.first.value == pytest.approx(0.93, abs=0.1)
    assert with_term.of(last).theta.value == pytest.approx(TRUE[last], abs=0.2)  # type: ignore[union-attr]
    assert with_term.strengths[-1].model == last
    assert without.of(last).theta.value > TRUE[last] + 0.5 and without.first is None  # type: ignore[union-attr]
    assert [each.model for each in without.strengths].index(last) <= 8


def test_ties_of_davidsons_model_are_recovered_and_every_metric_orders_as_the_strengths_do() -> None:
    verdicts = drawn(8, ties=0.95)
    share = statistics.fmean(each.label not in ("A", "B") for each in verdicts)
    assert share == pytest.approx(0.3, abs=0.02)
    fit = fitted(verdicts, encoding="davidson")
    assert fit.ties is not None and fit.ties.value == pytest.approx(0.95, rel=0.1)
    assert statistics.fmean(covered(fit)) >= 0.8 and fit.gradient < 1e-6
    found = tallies(verdicts)
    for metric in METRICS:
        order = sorted(found, key=lambda model: -(rate(found[model], metric) or 0.0))
        signs = [a < b for place, b in enumerate(order) for a in order[:place]]
        assert 2 * statistics.fmean(signs) - 1 >= 0.85, metric


def test_dividing_ties_by_random_leans_is_unbiased() -> None:
    even = [rate(tallies(drawn(seed, 200, ties=2.0, strengths=(0.0, 0.0, 0.0)))[NAMES[0]], "fdt") for seed in range(30)]
    assert statistics.fmean(even) == pytest.approx(0.5, abs=0.015)  # type: ignore[type-var]


def test_what_has_no_finite_estimate_is_said_and_holds_up_nobody_else() -> None:
    verdicts = drawn(9, 200, strengths=STRENGTHS[:4])
    champion = [verdict(f"c{i}", "champion", NAMES[i % 4], "A", first="champion") for i in range(8)]
    alone, beside = fitted(verdicts, position=False), fitted([*verdicts, *champion], position=False)
    assert beside.of("champion").theta is None and "unbounded" in (beside.of("champion").reason or "")
    assert beside.of("champion").rank is None and beside.of("champion").elo is None
    for name in NAMES[:4]:
        assert beside.of(name).theta.value == pytest.approx(alone.of(name).theta.value, abs=1e-3)  # type: ignore[union-attr]


def test_groups_that_never_met_are_ranked_apart() -> None:
    island = [verdict(f"i{n}", "p", "q", "A" if n % 3 else "B") for n in range(30)]
    fit = fitted([*drawn(10, 100), *island])
    assert {each.model: each.component for each in fit.strengths if each.component} == {"p": 1, "q": 1}
    p, q = fit.of("p").theta, fit.of("q").theta
    assert p is not None and q is not None and p.value == pytest.approx(-q.value) and fit.of("p").rank == 1


def test_neighbours_share_a_rank_unless_their_difference_is_sure() -> None:
    sure = fitted(drawn(11, 800, strengths=(1.0, 0.0, -1.0)))
    assert [each.rank for each in sure.strengths] == [1, 2, 3]
    unsure = fitted(drawn(11, 30, strengths=(0.05, 0.0, 0.0)))
    assert [each.rank for each in unsure.strengths] == [1, 1, 1]


def test_the_first_position_has_no_coefficient_where_both_orders_were_shown() -> None:
    both = [verdict(each.uid, each.a, each.b, each.label) for each in drawn(12, 50)]
    assert fitted(both).first is None


def test_a_judge_that_always_takes_the_first_has_no_finite_coefficient() -> None:
    always = [verdict(each.uid, each.a, each.b, "A", first=each.a) for each in drawn(13, 50)]
    assert fitted(always).first is None
    never = [verdict(each.uid, each.a, each.b, "Tie(B)", first=each.a) for each in always]
    assert fitted(never).first is None
    assert fitted([*always, verdict("x", NAMES[0], NAMES[1], "B", first=NAMES[0])]).first is not None


def test_a_covariate_takes_what_is_its_own() -> None:
    """Models of equal strength; the longer answer wins with log odds of 1 a standard deviation."""
    import random

    source, verdicts, lengths = random.Random(0), [], {}
    for number in range(1500):
        uid, (a, b) = f"{number:07d}", source.sample(NAMES[:3], 2)
        lengths[uid, a], lengths[uid, b] = (source.gauss(float(m == NAMES[0]), 1) for m in (a, b))
        lead = lengths[uid, a] - lengths[uid, b]
        verdicts.append(verdict(uid, a, b, "A" if source.random() < 1 / (1 + math.exp(-lead)) else "B"))
    raw, controlled = fitted(verdicts), fitted(verdicts, covariates={"length": lengths})
    assert raw.of(NAMES[0]).theta.low > 0.2  # type: ignore[union-attr]
    held = controlled.of(NAMES[0]).theta
    assert held is not None and held.low < 0 < held.high
    spread = statistics.fmean((lengths[v.uid, v.a] - lengths[v.uid, v.b]) ** 2 for v in verdicts) ** 0.5
    assert controlled.covariates["length"].value == pytest.approx(spread, rel=0.1)
    with pytest.raises(TersorError, match="'length' has no value"):
        fit_strengths(verdicts, covariates={"length": {}})


def test_nothing_gives_nothing_and_all_ties_give_equal_strengths() -> None:
    assert fit_strengths([]) is None
    ties = [verdict(str(n), "x", "y", "Tie") for n in range(5)]
    assert fit_strengths(ties, encoding="decisive") is None
    fit = fitted(ties, encoding="davidson")
    assert fit.ties is None and [each.theta.value for each in fit.strengths] == pytest.approx([0, 0])  # type: ignore[union-attr]
    assert kendall(ties, ties) in (None, 1.0)
