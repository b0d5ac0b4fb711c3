"""All that a report says as plain values for JSON: no NaN, and a reason for each null."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tersor.opening.agreement import agreement, halves, kappa, kendall, matched
from tersor.opening.fits import Covariates, Encoding, Fit, fit_strengths
from tersor.opening.intervals import Interval, share
from tersor.opening.judging.runner import contestant
from tersor.opening.ranking import METRICS, Tally, by_topic, components, matrix, rate, tallies
from tersor.opening.records import Raw, Step, Verdict, from_one_order
from tersor.opening.store import HUMAN, Store

#: Encodings of ties that a report shows beside FDT's.
OTHERS: tuple[Encoding, ...] = ("half", "decisive", "davidson")
Told = dict[str, Any]


def summarize(store: Store, judge: str, *, prompt: str | None = None) -> Told:
    """What one judge's verdicts come to.

    Args:
        store: The run.
        judge: Its id; 'human' is the consensus of all people.
        prompt: Hash of a prompt, needed where the judge was asked with several.

    Raises:
        TersorError: If there is no such judge, or it was asked with several prompts and none is named.
    """
    verdicts = store.verdicts(judge, prompt=prompt)
    battles = {each.id: each for each in store.battles()}
    members = store.members(judge)
    raw = [row for who in members for row in store.raw(who, prompt=prompt, rep=0) if row.battle in battles]
    shown = [from_one_order(battles[row.battle], row) for row in raw if row.label is not None and row.status == "ok"]
    fit = fit_strengths(verdicts)
    return {
        "judge": _judge(store, judge, prompt, members),
        "counts": _counts(store, verdicts, raw),
        "position": position(verdicts, shown),
        "models": _models(verdicts, fit),
        "strengths": _strengths(verdicts, fit, measures(store)),
        "components": components(verdicts),
        "matrices": _matrices(verdicts),
        "topics": _topics(store, verdicts),
        "repeatability": repeatability(verdicts, store.verdicts(judge, prompt=prompt, rep=1)),
        "people": annotators(store, members),
    }


def interval(found: Interval | None, reason: str = "no battle counts") -> Told:
    """A figure with its interval; where there is none, null and why."""
    if found is None:
        return {"value": None, "low": None, "high": None, "reason": reason}
    return {"value": found.value, "low": found.low, "high": found.high}


def position(verdicts: Sequence[Verdict], shown: Sequence[Verdict]) -> Told:
    """What being shown first is worth to a judge.

    Args:
        verdicts: Its final words.
        shown: What it said to each order by itself.
    """
    decisive = [each for each in shown if each.label in ("A", "B")]
    first = [float((each.a if each.label == "A" else each.b) == each.first) for each in decisive]
    both = [each for each in verdicts if each.consistent is not None]
    fit = fit_strengths(shown)
    return {
        "first_share": interval(share(first, [1.0] * len(first), [each.uid for each in decisive])),
        "first_share_n": len(decisive),
        "coefficient": interval(
            fit.first if fit else None, "the answer shown first always wins, or never" if decisive else "no win counts"
        ),
        "consistent": interval(
            share([float(bool(each.consistent)) for each in both], [1.0] * len(both), [each.uid for each in both]),
            "no battle was shown in both orders",
        ),
        "consistent_n": len(both),
    }


def repeatability(verdicts: Sequence[Verdict], again: Sequence[Verdict]) -> Told:
    """How much a second run would say the same: on the same battles, and on other instances.

    Args:
        verdicts: Of the run.
        again: Of the same judge asked again, if it was.
    """
    pairs = matched(again, verdicts)
    return {
        "same_pairs": interval(agreement(pairs, "fdt"), "the judge was not asked twice"),
        "same_pairs_n": len(pairs),
        "new_pairs_tau": kendall(*halves(verdicts)),
        "new_pairs": "Kendall's tau between the rankings by FDT of two halves of the instances",
    }


def annotators(store: Store, members: Sequence[str]) -> list[Told]:
    """Agreement of each two people, or judges of a panel, on the battles that both decided."""
    votes = {who: store.verdicts(who) for who in members}
    rows = []
    for one, other in itertools.combinations(members, 2):
        pairs = matched(votes[one], votes[other])
        rows.append({
            "one": one.removeprefix("human:"), "other": other.removeprefix("human:"), "n": len(pairs),
            "fdt": interval(agreement(pairs, "fdt")), "kappa": kappa(pairs),
        })  # fmt: skip
    return rows


def measures(store: Store) -> Covariates:
    """What answers differ in beside their quality: letters, steps and pictures."""
    answers = {(uid, model): steps for model in store.models() for uid, steps in store.outputs(model).items()}
    return {
        "letters": {key: float(sum(len(step.text) for step in steps)) for key, steps in answers.items()},
        "steps": {key: float(len(steps)) for key, steps in answers.items()},
        "pictures": {key: float(_pictures(steps)) for key, steps in answers.items()},
    }


def _pictures(steps: Sequence[Step]) -> int:
    return sum(step.image is not None for step in steps)


def _judge(store: Store, judge: str, prompt: str | None, members: Sequence[str]) -> Told:
    known = store.prompts(judge)
    hashed = prompt if prompt is not None else next(iter(known), "")
    return {
        "id": judge,
        "prompt_hash": hashed or None,
        "settings": store.settings(judge, hashed) if known else {},
        "people": len(members) if judge == HUMAN else None,
        "contestant": next(filter(None, (contestant(each, store.models()) for each in members)), None),
    }


def _counts(store: Store, verdicts: Sequence[Verdict], raw: Sequence[Raw]) -> Told:
    battles = len(store.battles())
    without = Counter(row.status for row in raw if row.label is None)
    return {
        "instances": len({each.uid for each in verdicts}),
        "battles": battles,
        "decided": len(verdicts),
        "missing": battles - len(verdicts),
        "asked": len(raw),
        "without_label": dict(sorted(without.items())),
        "decided_without_asking": sum(row.status == "empty" for row in raw),
        "ties_divided_by_hash": sum(each.label == "Tie" for each in verdicts),
    }


def _models(verdicts: Sequence[Verdict], fit: Fit | None) -> list[Told]:
    groups = [each.uid for each in verdicts]
    rows = []
    for model, tally in tallies(verdicts).items():
        own = [Tally().plus(each, model) if model in (each.a, each.b) else Tally() for each in verdicts]
        row: Told = {
            "model": model, "battles": tally.battles, "wins": tally.wins, "losses": tally.losses, "ties": tally.ties,
        }  # fmt: skip
        for metric, parts in METRICS.items():
            numerators, denominators = zip(*map(parts, own), strict=True)
            row[metric] = interval(share(numerators, denominators, groups))
        strength = fit.of(model) if fit else None
        reason = (strength.reason if strength else None) or "no battle counts"
        row |= {
            "rank": strength.rank if strength else None,
            "component": strength.component if strength else None,
            "theta": interval(strength.theta if strength else None, reason),
            "elo": interval(strength.elo if strength else None, reason),
        }
        rows.append(row)
    return rows


def _strengths(verdicts: Sequence[Verdict], fit: Fit | None, values: Covariates) -> Told:
    """Elo by encoding of ties, and with the same style for all."""
    fits: dict[str, Fit | None] = {"fdt": fit} | {name: fit_strengths(verdicts, encoding=name) for name in OTHERS}
    answered = [each for each in verdicts if all((each.uid, m) in values["steps"] for m in (each.a, each.b))]
    controlled = fit_strengths(answered, covariates=values) if answered else None
    fits["controlled"] = controlled
    return {
        "interval": fit.interval if fit else None,
        "elo": {name: _elo(found) for name, found in fits.items()},
        "davidson_ties": interval(fits["davidson"].ties if fits["davidson"] else None),
        "covariates": {name: interval(found) for name, found in (controlled.covariates if controlled else {}).items()},
    }


def _elo(fit: Fit | None) -> dict[str, Told]:
    return {each.model: interval(each.elo, each.reason or "") for each in fit.strengths} if fit else {}


def _matrices(verdicts: Sequence[Verdict]) -> Told:
    order = list(tallies(verdicts))
    found: Told = {metric: matrix(verdicts, order, metric) for metric in METRICS}
    found["without_ties_published"] = matrix(verdicts, order, "without_ties", published=True)
    return {"models": order, **found}


def _topics(store: Store, verdicts: Sequence[Verdict]) -> Told:
    def table(parts: Mapping[str, list[Verdict]]) -> Told:
        return {
            name: {model: {"fdt": rate(tally, "fdt"), "n": tally.battles} for model, tally in tallies(part).items()}
            for name, part in parts.items()
        }

    # The first spelling of each; there may be several.
    names = {each.meta_task_id.zfill(2): each.meta_task_name for each in reversed(store.instances())}
    return {"names": names, "topics": table(by_topic(verdicts)), "tasks": table(by_topic(verdicts, task=True))}
