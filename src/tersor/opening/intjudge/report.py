"""What a judge's training came to: figures, the card of the adapter, and the plot of its reliability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor import _atomic
from tersor.bench.plots import Line, plot_lines
from tersor.opening.intervals import Interval
from tersor.opening.intjudge.calibration import Bin, calibration_error, reliability
from tersor.opening.intjudge.evaluation import Decided
from tersor.opening.intjudge.pairs import Parts

if TYPE_CHECKING:
    from tersor.opening.intjudge.config import IntJudgeConfig

MODES = {"fdt": "FDT", "with_ties": "w/ tie", "without_ties": "w/o tie"}
#: Confidences at which the card says how many battles are left, and how many of those are right.
LEAST = (0.6, 0.7, 0.8, 0.9)


def told(
    before: Decided, after: Decided, blank: Decided, tested: Decided, temperature: float, *, parts: Parts,
    unseen: Sequence[str], hashes: dict[str, str], log: Sequence[dict[str, Any]], facts: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """All that the card says, as JSON takes it.

    Args:
        before: The model before the training, on the battles to validate with.
        after: The judge on the same ones.
        blank: The judge on the same ones without pictures in the answers.
        tested: The judge with its temperature, on instances that this was not fitted on.
        temperature: Of the probabilities.
        parts: What was trained and validated on.
        unseen: Models that were in no pair of the training.
        hashes: Of the data.
        log: What the trainer logged.
        facts: What the run is about.
    """
    raw = reliability(*_untempered(after, tested))
    bins = reliability(*tested.chances())
    kinds = [pair.kind for pair in parts.training]
    return {
        "facts": facts,
        "pairs": {kind: kinds.count(kind) for kind in ("arena", "reference")} | {"validation": len(after.pairs)},
        "dropped": dict(parts.dropped),
        "data": hashes,
        "unseen": list(unseen),
        "before": measures(before, unseen),
        "after": measures(after, unseen),
        "without_pictures": interval(blank.agreement()),
        "temperature": temperature,
        "reliability": [{**asdict(each.right), "confidence": each.confidence, "n": each.n} for each in bins],
        "calibration_error": {"as_trained": calibration_error(raw), "with_temperature": calibration_error(bins)},
        "sure": sure(tested),
        "log": [row for row in log if "loss" in row],
    }


def measures(found: Decided, unseen: Sequence[str]) -> dict[str, Any]:
    """Agreement by the published modes, the share of the first place, consistency, and mass."""
    return {
        "agreement": {
            mode: {name: interval(getattr(row, name)) for name in ("average", "seen", "unseen")} | {"n": list(row.n)}
            for mode, row in found.table(unseen).items()
        },
        "first_share": interval(found.first_share()),
        "consistent": interval(found.consistent()),
        "log_mass": found.log_mass(),
    }


def interval(found: Interval | None) -> dict[str, float] | None:
    """An interval as JSON takes it."""
    return None if found is None else found._asdict()


def sure(found: Decided) -> list[dict[str, float]]:
    """At each least confidence: the share of battles that the judge decides, and how many of them it has right."""
    chances, wins = found.chances()
    rows = []
    for least in LEAST:
        kept = [(p > 0.5) == won for p, won in zip(chances, wins, strict=True) if max(p, 1 - p) >= least]
        rows.append({"least": least, "kept": len(kept) / len(wins), "right": sum(kept) / len(kept) if kept else 0.0})
    return rows


def reliability_plot(bins: Sequence[Bin], name: str) -> str:
    """SVG: how often the winner is right against how sure the judge is of it; on the diagonal it can be believed."""
    points = tuple((100 * b.confidence, 100 * b.right.value, 100 * b.right.low, 100 * b.right.high) for b in bins)
    ends = tuple((x, x, x, x) for x in (50.0, 100.0))
    return plot_lines(
        [Line(name, points), Line("exact", ends)],
        x_label="probability that the judge gives its winner, %",
        y_label="battles in which it is right, %",
        description=f"Reliability of {name}: right winners against the probability that it gave them",
    )


def write_card(folder: Path, found: dict[str, Any], config: IntJudgeConfig) -> None:
    """Write the ``README.md`` of an adapter."""
    _atomic.write_text(folder / "README.md", "\n".join(card(found, config)) + "\n")


def card(found: dict[str, Any], config: IntJudgeConfig) -> list[str]:
    """The card's lines: what the judge is for, how far it agrees, and where not to trust it."""
    after, before = found["after"], found["before"]
    name, pairs, blank = str(found["facts"].get("model", "model")), found["pairs"], found["without_pictures"]
    first, errors = after["first_share"], found["calibration_error"]
    return [
        f"# A judge from {name}", "",
        "An adapter trained with tersor that says which of two answers in text and pictures is better (IntJudge of "
        "OpenING, arXiv 2411.18499).", "",
        "```console", "$ tersor opening judge run/ --judge hf:path/to/this/folder", "```", "",
        f"Trained on {pairs['arena']} battles that somebody decided and {pairs['reference']} pairs of an answer with "
        f"the gold answer at hand and one without, seed {config.seed}; validated on {pairs['validation']} decided "
        "battles on other instances.", "",
        "| agreement, % [95 %] | before | after | after, models of the training | after, other models |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {title} | {percent(before['agreement'][mode]['average'])} | "
            + " | ".join(percent(after["agreement"][mode][part]) for part in ("average", "seen", "unseen")) + " |"
            for mode, title in MODES.items()
        ),
        "",
        "| | before | after |", "|---|---:|---:|",
        f"| the answer shown first wins, % | {percent(before['first_share'])} | {percent(first)} |",
        f"| same winner in both orders, % | {percent(before['consistent'])} | {percent(after['consistent'])} |",
        f"| log-probability of the four verdicts together | {before['log_mass']:.2f} | {after['log_mass']:.2f} |",
        f"| agreement with the answers' pictures grey, % | | {percent(blank)} |", "",
        f"Probabilities are divided by a temperature of {found['temperature']:.2f}, fitted on half of the validated "
        "instances. On the other half they are off by "
        f"{100 * errors['with_temperature']:.1f} points on average, without it by {100 * errors['as_trained']:.1f}.",
        "",
        "| it must be this sure | battles that it decides, % | of those right, % |", "|---|---:|---:|",
        *(f"| {row['least']:.0%} | {100 * row['kept']:.1f} | {100 * row['right']:.1f} |" for row in found["sure"]), "",
        "## Where not to trust it", "",
        *(f"- {line}" for line in doubts(found)), "",
        "Data (SHA-256): " + ", ".join(f"{which} `{value[:16]}`" for which, value in found["data"].items()) + ".",
    ]  # fmt: skip


def doubts(found: dict[str, Any]) -> list[str]:
    """What the figures say against the judge, a line each."""
    after, blank = found["after"], found["without_pictures"]
    table = after["agreement"]["fdt"]
    lines = [
        "Battles unlike those that it was trained on: other tasks, other kinds of faults, people with other taste. "
        "Have people decide a random sample, and let `tersor opening compare --people human` correct it.",
    ]
    if table["unseen"] is None:
        lines.append("Models that it was not trained on: none was held out, so nothing is known.")
    elif table["seen"] is not None and table["unseen"]["value"] < table["seen"]["value"] - 0.05:
        lines.append("Models that it was not trained on: it agrees less there, see the table.")
    if blank is not None and table["average"] is not None and blank["value"] > table["average"]["value"] - 0.1:
        lines.append("**Pictures: without them it agrees nearly as often, so it does not judge by them.**")
    if abs(after["first_share"]["value"] - 0.5) > 0.06:
        lines.append("One order alone: it likes a place. Ask in both orders, as `tersor opening judge` does.")
    if after["log_mass"] < -1:
        lines.append("Its text: it often says something else than a verdict; its scores are relative to the four.")
    lines.append("Its own text, and answers of the model that it was trained from: no judge is neutral there.")
    return lines


def percent(found: dict[str, float] | None) -> str:
    """A share with its interval."""
    if found is None:
        return "–"
    return f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def _untempered(after: Decided, tested: Decided) -> tuple[list[float], list[bool]]:
    kept = {pair.verdict.battle for pair in tested.pairs}
    places = [place for place, pair in enumerate(after.pairs) if pair.verdict.battle in kept]
    own = Decided([after.pairs[at] for at in places], [after.raw[at] for at in places], after.judge)
    return own.chances()
