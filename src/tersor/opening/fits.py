"""Strengths from verdicts: Bradley-Terry and Davidson's ties, with first position, covariates and clustered intervals.

Both models are one exponential family: a battle's statistic ``T(y)`` (the score; for Davidson also whether it was a
tie) has natural parameters that are linear in all that is estimated. So there is one likelihood and one sandwich:

- Bradley and Terry 1952: ``logit P(a beats b) = theta_a - theta_b + gamma x + beta z``, where ``x`` is 1 if a was shown
  first, -1 if b was, 0 if both orders were, and ``z`` are differences of covariates;
- Davidson 1970: weights ``exp(d/2)``, ``exp(-d/2)`` and ``nu`` of a win, a loss and a tie, with ``d`` as above.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tersor._errors import TersorError
from tersor._lazy import require
from tersor.opening.intervals import Interval, weights
from tersor.opening.ranking import components, models_of, oriented, unbounded, winner
from tersor.opening.records import Verdict

Encoding = Literal["fdt", "half", "decisive", "davidson"]
#: Name -> (uid, model) -> value of the model's answer.
Covariates = Mapping[str, Mapping[tuple[str, str], float]]
_Floats = npt.NDArray[np.float64]

#: Elo points of a natural unit of strength, and where their mean lies.
ELO, ELO_MEAN = 400 / math.log(10), 1000.0
#: Holds strengths that have no finite estimate; it moves others by less than they are rounded.
RIDGE = 1e-6
_Z = 1.959964
_NEWTON_STEPS = 8


@dataclass(frozen=True)
class Strength:
    """A model among those that battles connect it with.

    Args:
        model: Its name.
        theta: Natural units; the mean of a component is 0. None where it has no finite estimate.
        rank: From 1 within the component; neighbours whose difference may be 0 share one. None without a theta.
        component: Index of its component, 0 the largest.
    """

    model: str
    theta: Interval | None
    rank: int | None
    component: int

    @property
    def elo(self) -> Interval | None:
        """On the scale of Elo, around 1,000."""
        return None if self.theta is None else Interval(*(ELO_MEAN + ELO * each for each in self.theta))

    @property
    def reason(self) -> str | None:
        """Why there is no estimate."""
        if self.theta is None:
            return "unbounded: no chain of wins leads both to it and from it; more battles are needed"
        return None


@dataclass(frozen=True)
class Fit:
    """Strengths of all models.

    Args:
        strengths: By component, the strongest first; those without an estimate last.
        first: Log odds that being shown first adds; None where both orders were shown, or it always or never wins.
        covariates: Name -> log odds of one standard deviation more.
        ties: Davidson's nu; None for the other encodings, and where no battle or every one was a tie.
        encoding: How labels became scores.
        interval: What the intervals are.
        battles: Verdicts that count.
        instances: Groups that they come in.
        gradient: Largest entry of the gradient of the penalized log likelihood at the estimate.
    """

    strengths: list[Strength]
    first: Interval | None
    covariates: dict[str, Interval]
    ties: Interval | None
    encoding: Encoding
    interval: str
    battles: int
    instances: int
    gradient: float

    def of(self, model: str) -> Strength:
        """The strength of one model."""
        return next(each for each in self.strengths if each.model == model)


def fit_strengths(
    verdicts: Sequence[Verdict],
    *,
    encoding: Encoding = "fdt",
    covariates: Covariates | None = None,
    position: bool = True,
    bootstrap: int = 0,
    seed: int = 0,
) -> Fit | None:
    """Estimate strengths; None where no verdict counts.

    Args:
        verdicts: One for each battle, or one for each order of it.
        encoding: "fdt" divides ties by their lean, "half" counts them half, "decisive" leaves them out, "davidson"
            estimates how often they happen.
        covariates: What else answers differ in, such as the length of their text ("style control").
        position: Estimate what being shown first adds.
        bootstrap: Resamples of whole instances for the intervals; 0 takes the sandwich estimator, clustered alike.
        seed: Of the resamples.

    Raises:
        TersorError: If a covariate lacks an answer.
    """
    counted = sorted((oriented(each, min(each.a, each.b)) for each in verdicts), key=_order)
    if encoding == "decisive":
        counted = [each for each in counted if each.label in ("A", "B")]
    if not counted:
        return None
    design = _Design.of(counted, encoding, covariates or {}, position=position)
    even = np.ones(len(counted))
    estimate, gradient = _maximize(design, even)
    if bootstrap:
        spread, kind = _resampled(design, estimate, bootstrap, seed), f"95% bootstrap over {design.clusters} instances"
    else:
        spread, kind = _sandwich(design, estimate), f"95% sandwich over {design.clusters} instances"
    return _told(design, estimate, spread, kind, encoding, counted, gradient)


@dataclass(frozen=True)
class _Design:
    """Battles as numbers.

    Args:
        natural: Natural parameters of a battle by estimated ones, ``[battles, parameters of a battle, estimated]``.
        statistic: ``T(y)``, ``[battles, parameters of a battle]``.
        cluster: Instance of each battle, from 0 ``[battles]``.
        models: Names of the first estimated parameters.
        extras: Names of the other ones.
        groups: Component of each model.
        loose: Models without a finite estimate.
    """

    natural: _Floats
    statistic: _Floats
    cluster: npt.NDArray[np.intp]
    models: list[str]
    extras: list[str]
    groups: list[int]
    loose: set[str]

    @property
    def clusters(self) -> int:
        """How many instances there are."""
        return int(self.cluster.max()) + 1

    @classmethod
    def of(cls, verdicts: Sequence[Verdict], encoding: Encoding, covariates: Covariates, *, position: bool) -> _Design:
        models = models_of(verdicts)
        place = {model: index for index, model in enumerate(models)}
        rows = np.arange(len(verdicts))
        difference = np.zeros((len(verdicts), len(models)))
        difference[rows, [place[each.a] for each in verdicts]] += 1
        difference[rows, [place[each.b] for each in verdicts]] -= 1
        shown = np.array([(each.first == each.a) - float(each.first == each.b) for each in verdicts])
        scores = np.array([_score(each, encoding) for each in verdicts])
        gain = (scores - 0.5) * shown
        # A judge that always takes the first answer, or never, has no finite coefficient.
        varies = gain.min() < 0 < gain.max() or not gain.any()
        columns = {"first": shown} if position and shown.any() and varies else {}
        columns |= {name: _standardized(name, values, verdicts) for name, values in covariates.items()}
        linear = np.column_stack([difference, *columns.values()])
        if encoding == "davidson":
            tie = np.array([float(each.label not in ("A", "B")) for each in verdicts])
            natural = np.zeros((len(verdicts), 2, linear.shape[1] + 1))
            # Without both kinds there is no finite nu, and its row stays empty.
            natural[:, 0, :-1], natural[:, 1, -1] = linear, 0 < tie.mean() < 1
            statistic = np.column_stack([scores - 0.5, tie])
            columns |= {"ties": tie}
        else:
            natural, statistic = linear[:, None], scores[:, None]
        _, cluster = np.unique([each.uid for each in verdicts], return_inverse=True)
        group = {model: index for index, found in enumerate(components(verdicts)) for model in found}
        told = zip((each.a for each in verdicts), (each.b for each in verdicts), map(float, scores), strict=True)
        return cls(natural, statistic, cluster, models, list(columns), [group[each] for each in models],
                   set(unbounded(told)))  # fmt: skip


_SIDES = {"A": 1.0, "B": -1.0}


def _order(verdict: Verdict) -> tuple[str, ...]:
    """A total order, so that the same verdicts give the same bits whichever way they come."""
    return (verdict.uid, verdict.a, verdict.b, verdict.first or "", verdict.label, verdict.battle)


def _score(verdict: Verdict, encoding: Encoding) -> float:
    if encoding == "fdt":
        return float(winner(verdict) == verdict.a)
    return (_SIDES.get(verdict.label, 0.0) + 1) / 2


def _standardized(name: str, values: Mapping[tuple[str, str], float], verdicts: Sequence[Verdict]) -> _Floats:
    try:
        found = np.array([values[each.uid, each.a] - values[each.uid, each.b] for each in verdicts], dtype=np.float64)
    except KeyError as error:
        raise TersorError(f"covariate {name!r} has no value for the answer {error}; measure every answer") from None
    spread = float(np.sqrt(np.mean(found**2)))
    return found / spread if spread else found


def _moments(eta: _Floats) -> tuple[_Floats, _Floats, _Floats]:
    """Log of the normalizer, mean and covariance of ``T`` at natural parameters ``[battles, 1 or 2]``."""
    if eta.shape[1] == 1:
        chance = _sigmoid(eta[:, 0])
        return np.logaddexp(0, eta[:, 0]), chance[:, None], (chance * (1 - chance))[:, None, None]
    logs = np.column_stack([eta[:, 0] / 2, -eta[:, 0] / 2, eta[:, 1]])
    total = np.logaddexp.reduce(logs, axis=1)
    win, loss, tie = np.exp(logs - total[:, None]).T
    lead = win - loss
    covariance = np.empty((len(eta), 2, 2))
    covariance[:, 0, 0] = (win + loss - lead**2) / 4
    covariance[:, 0, 1] = covariance[:, 1, 0] = -lead * tie / 2
    covariance[:, 1, 1] = tie * (1 - tie)
    return total, np.column_stack([lead / 2, tie]), covariance


def _sigmoid(x: _Floats) -> _Floats:
    return np.exp(-np.logaddexp(0, -x))


def _maximize(design: _Design, weight: _Floats, start: _Floats | None = None) -> tuple[_Floats, float]:
    """The estimate, and the largest entry of the gradient there: L-BFGS, then Newton's last digits."""
    optimize = require("scipy.optimize", "arena")
    rows = design.natural.reshape(-1, design.natural.shape[2])
    begin = np.zeros(design.natural.shape[2]) if start is None else start

    def loss(estimate: _Floats) -> tuple[float, _Floats]:
        eta = design.natural @ estimate
        total, mean, _ = _moments(eta)
        value = float(weight @ (total - (eta * design.statistic).sum(1)))
        slope = (weight[:, None] * (mean - design.statistic)).ravel() @ rows
        return value + RIDGE / 2 * float(estimate @ estimate), slope + RIDGE * estimate

    estimate = optimize.minimize(loss, begin, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    value, slope = loss(estimate)
    for _ in range(_NEWTON_STEPS):
        step = estimate - np.linalg.solve(_curvature(design, weight, estimate), slope)
        after, new = loss(step)
        if np.abs(new).max() >= np.abs(slope).max() or after > value + 1e-9:
            break
        estimate, value, slope = step, after, new
    return _centred(design, estimate), float(np.abs(slope).max())


def _curvature(design: _Design, weight: _Floats, estimate: _Floats) -> _Floats:
    """Minus the Hessian of the penalized log likelihood."""
    _, _, covariance = _moments(design.natural @ estimate)
    spread = (weight[:, None, None] * covariance) @ design.natural
    width = len(estimate)
    found: _Floats = design.natural.reshape(-1, width).T @ spread.reshape(-1, width) + RIDGE * np.eye(width)
    return found


def _sandwich(design: _Design, estimate: _Floats) -> _Floats:
    """Covariance of the estimate, clustered by instance (Liang and Zeger 1986)."""
    _, mean, _ = _moments(design.natural @ estimate)
    scores = np.einsum("nk,nkp->np", design.statistic - mean, design.natural)
    by_cluster = np.zeros((design.clusters, scores.shape[1]))
    np.add.at(by_cluster, design.cluster, scores)
    few = design.clusters / max(design.clusters - 1, 1)
    inverse = np.linalg.inv(_curvature(design, np.ones(len(scores)), estimate))
    # Centred from both sides: along the common mean the curvature is the ridge alone.
    inverse = _centring(design) @ inverse
    found: _Floats = inverse @ (few * by_cluster.T @ by_cluster) @ inverse.T
    return found


def _resampled(design: _Design, estimate: _Floats, resamples: int, seed: int) -> _Floats:
    """Estimates of resamples of whole instances, ``[resamples, estimated]``."""
    drawn = weights(design.clusters, seed=seed, resamples=resamples)[:, design.cluster]
    return np.stack([_maximize(design, weight, estimate)[0] for weight in drawn])


def _centring(design: _Design) -> _Floats:
    """Subtracts from each strength the mean of its component."""
    found = np.eye(design.natural.shape[2])
    for group in set(design.groups):
        inside = [place for place, each in enumerate(design.groups) if each == group]
        # What is unbounded would carry the mean away with it.
        firm = [place for place in inside if design.models[place] not in design.loose] or inside
        found[np.ix_(inside, firm)] -= 1 / len(firm)
    return found


def _centred(design: _Design, estimate: _Floats) -> _Floats:
    found: _Floats = _centring(design) @ estimate
    return found


def _interval(contrast: _Floats, estimate: _Floats, spread: _Floats, *, drawn: bool) -> Interval:
    """Of ``contrast @ estimate``; ``spread`` is a covariance, or estimates that were ``drawn``."""
    value = float(contrast @ estimate)
    if drawn:
        low, high = np.quantile(spread @ contrast, [0.025, 0.975])
        return Interval(value, min(float(low), value), max(float(high), value))
    half = _Z * math.sqrt(max(float(contrast @ spread @ contrast), 0.0))
    return Interval(value, value - half, value + half)


def _told(design: _Design, estimate: _Floats, spread: _Floats, kind: str, encoding: Encoding,
          verdicts: Sequence[Verdict], gradient: float) -> Fit:  # fmt: skip
    unit, drawn = np.eye(len(estimate)), kind.startswith("95% bootstrap")

    def of(contrast: _Floats) -> Interval:
        return _interval(contrast, estimate, spread, drawn=drawn)

    strengths: list[Strength] = []
    for group in sorted(set(design.groups)):
        inside = [place for place, each in enumerate(design.groups) if each == group]
        firm = [place for place in inside if design.models[place] not in design.loose]
        firm.sort(key=lambda place: (-estimate[place], design.models[place]))
        rank = 1
        for number, place in enumerate(firm):
            if number and of(unit[firm[number - 1]] - unit[place]).low > 0:
                rank = number + 1
            strengths.append(Strength(design.models[place], of(unit[place]), rank, group))
        strengths += [Strength(design.models[p], None, None, group) for p in inside if p not in firm]
    extras = {name: of(unit[len(design.models) + number]) for number, name in enumerate(design.extras)}
    ties = extras.pop("ties", None)
    known = ties is not None and design.natural[:, 1, -1].any()
    return Fit(
        strengths, extras.pop("first", None), extras, Interval(*map(math.exp, ties)) if ties and known else None,
        encoding, kind, len(verdicts), design.clusters, gradient,
    )  # fmt: skip
