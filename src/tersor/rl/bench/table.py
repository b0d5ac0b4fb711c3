"""The table of ZipR1: every way to train, in every setting, over several seeds, on questions never trained on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tersor._weights import fingerprint
from tersor.bench.measure import Estimate, over_seeds
from tersor.bench.runs import Finished, OnProgress
from tersor.kv.bench.tiles import KINDS, samples
from tersor.rl.bench.arms import SETTINGS, Plan, Setting, train_arm
from tersor.rl.bench.outcome import Outcome, ask
from tersor.rl.policy import load_policy

START = "start"
#: Seed of the held-out questions; each seed of a training adds to it.
HELD_OUT = 777


@dataclass
class Row:
    """One model in one setting.

    Args:
        sparse: At the threshold in use.
        dense: With dense attention.
        random: With random visual tokens at the visual shares of ``sparse``.
        ends: Of the start, at the ends of the training's thresholds.
        log: What the trainer logged.
    """

    sparse: Outcome
    dense: Outcome
    random: Outcome
    ends: list[Outcome]
    log: list[dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """Which table a progress file belongs to."""

    plan: Plan
    model: str
    questions: int
    weights: str


def run_table(
    source: Path,
    processor: Any,
    plan: Plan,
    arms: Sequence[str],
    settings: Sequence[str],
    seeds: Sequence[int],
    *,
    n: int,
    progress: Path | None,
    on_progress: OnProgress = lambda name: None,
) -> dict[str, Row]:
    """Train and ask; ``"<setting> / <arm> / <seed>"`` -> what came of it.

    Args:
        source: Folder of the model to start from.
        processor: Its processor.
        plan: The training.
        arms: Ways of `ARMS` and `SUPERVISED`.
        settings: Of `SETTINGS`.
        seeds: Seeds of trainings.
        n: Held-out questions of each kind for each seed, which are others for every seed.
        progress: A file that keeps what is done; None keeps nothing.
        on_progress: Told what is being done.
    """
    job = Job(plan, str(source), n, fingerprint(source))
    finished = Finished(progress, job, _read)

    def row(model: Any, own: Setting, log: list[dict[str, Any]], seed: int, ends: tuple[float, ...]) -> Row:
        drawn = samples(n, seed=HELD_OUT + seed, grid=plan.grid)
        how: dict[str, Any] = {"skip_layers": own.skip_layers, "checked": own.checked}
        sparse = ask(model, processor, drawn, plan.eval_threshold, **how)
        dense = ask(model, processor, drawn, 1.0, checked=own.checked)
        chance = ask(model, processor, drawn, plan.eval_threshold, **how, random=sparse.visual_ratios(), seed=seed)
        return Row(sparse, dense, chance, [ask(model, processor, drawn, tau, **how) for tau in ends], log)

    for setting, seed, arm in itertools.product(settings, seeds, [START, *arms]):
        if not SETTINGS[setting].allows(arm):
            continue
        on_progress(f"{setting}: {arm}, seed {seed}")

        def make(setting: str = setting, seed: int = seed, arm: str = arm) -> Row:
            own = SETTINGS[setting]
            if arm == START:
                return row(load_policy(str(source)).eval(), own, [], seed, _ends(plan))
            model, log = train_arm(arm, source, processor, plan, seed=seed, setting=own)
            return row(model, own, log, seed, ())

        finished.once(f"{setting} / {arm} / {seed}", make)
    return finished.results


def over(rows: dict[str, Row], setting: str, arm: str) -> list[Row]:
    """The rows of one way in one setting, by seed."""
    found = {key: row for key, row in rows.items() if key.startswith(f"{setting} / {arm} / ")}
    return [found[key] for key in sorted(found)]


def figures(rows: Sequence[Row], start: Sequence[Row]) -> dict[str, Estimate]:
    """What the table says of one way, each with its interval over seeds.

    Args:
        rows: The way's models, one a seed.
        start: The model before all of them, asked the same questions.
    """
    lost = [row.sparse.accuracy - before.sparse.accuracy for row, before in zip(rows, start, strict=True)]
    return {
        "ratio": over_seeds([row.sparse.ratio for row in rows]),
        "accuracy": over_seeds([row.sparse.accuracy for row in rows]),
        "lost": over_seeds(lost),
        "dense": over_seeds([row.dense.accuracy for row in rows]),
        "random": over_seeds([row.random.accuracy for row in rows]),
        "relevant": over_seeds([float(np.mean(row.sparse.relevant)) for row in rows]),
        "read": over_seeds([float(np.mean(row.sparse.read)) for row in rows]),
        **{kind: over_seeds([row.sparse.of_kind(kind) for row in rows]) for kind in KINDS},
    }


def _ends(plan: Plan) -> tuple[float, float]:
    """The thresholds of a training that are farthest apart, dense attention left out."""
    sparse = [tau for tau in plan.thresholds if tau < 1.0]
    return min(sparse), max(sparse)


def _read(kept: dict[str, Any]) -> Row:
    outcomes = {name: Outcome(**kept[name]) for name in ("sparse", "dense", "random")}
    return Row(**outcomes, ends=[Outcome(**each) for each in kept["ends"]], log=kept["log"])
