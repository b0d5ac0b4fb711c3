"""The table of ZipR1: every way to train, in every setting, over several seeds, on questions never trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tersor.bench.measure import Estimate, bootstrap_interval, over_seeds
from tersor.bench.runs import Finished, OnProgress
from tersor.kv.bench.tiles import KINDS, samples
from tersor.rl.bench.arms import SETTINGS, Plan, train_arm
from tersor.rl.bench.outcome import Outcome, ask
from tersor.rl.policy import load_policy

START = "start"
#: Seed of the held-out questions.
HELD_OUT = 777


@dataclass
class Row:
    """One model in one setting.

    Args:
        sparse: At the threshold in use.
        dense: With dense attention.
        random: With random visual tokens at the visual shares of ``sparse``.
        ends: Accuracy and ratio at the ends of the training's thresholds, where they were asked for.
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
        arms: Ways of `ARMS` and `IMITATION`.
        settings: Of `SETTINGS`.
        seeds: Seeds of trainings.
        n: Held-out questions of each kind.
        progress: A file that keeps what is done; None keeps nothing.
        on_progress: Told what is being done.
    """
    job = Job(plan, str(source), n, _weights(source))
    finished = Finished(progress, job, _read)
    drawn = samples(n, seed=HELD_OUT, grid=plan.grid)

    def row(model: Any, skip: tuple[int, ...], log: list[dict[str, Any]], seed: int) -> Row:
        sparse = ask(model, processor, drawn, plan.eval_threshold, skip_layers=skip)
        dense = ask(model, processor, drawn, 1.0)
        chance = ask(
            model, processor, drawn, plan.eval_threshold, skip_layers=skip, random=sparse.visual_ratios(), seed=seed
        )
        ends = [ask(model, processor, drawn, tau, skip_layers=skip) for tau in _ends(plan)]
        return Row(sparse, dense, chance, ends, log)

    for setting in settings:
        skip = SETTINGS[setting]
        on_progress(f"{setting}: start")
        finished.once(f"{setting} / {START} / 0", lambda skip=skip: row(load_policy(str(source)).eval(), skip, [], 0))  # type: ignore[misc]
        for seed in seeds:
            for arm in arms:
                on_progress(f"{setting}: {arm}, seed {seed}")

                def make(arm: str = arm, seed: int = seed, skip: tuple[int, ...] = skip) -> Row:
                    model, log = train_arm(arm, source, processor, plan, seed=seed, skip_layers=skip)
                    return row(model, skip, log, seed)

                finished.once(f"{setting} / {arm} / {seed}", make)
    return finished.results


def over(rows: dict[str, Row], setting: str, arm: str) -> list[Row]:
    """The rows of one way in one setting, by seed."""
    found = {key: row for key, row in rows.items() if key.startswith(f"{setting} / {arm} / ")}
    return [found[key] for key in sorted(found)]


def figures(rows: Sequence[Row], start: Row) -> dict[str, Estimate]:
    """What the table says of one way, each with its interval: over seeds, or over questions where there is one model.

    Args:
        rows: The way's models, one a seed.
        start: The model before all of them.
    """

    told = {
        "ratio": over_seeds([row.sparse.ratio for row in rows]),
        "accuracy": over_seeds([row.sparse.accuracy for row in rows]),
        "lost": over_seeds([row.sparse.accuracy - start.sparse.accuracy for row in rows]),
        "dense": over_seeds([row.dense.accuracy for row in rows]),
        "random": over_seeds([row.random.accuracy for row in rows]),
        "relevant": over_seeds([float(np.mean(row.sparse.relevant)) for row in rows]),
        "read": over_seeds([float(np.mean(row.sparse.read)) for row in rows]),
        **{kind: over_seeds([row.sparse.of_kind(kind) for row in rows]) for kind in KINDS},
    }
    if len(rows) == 1:
        told["ratio"] = bootstrap_interval(rows[0].sparse.ratios)
        told["accuracy"] = bootstrap_interval(rows[0].sparse.right)
        told["dense"] = bootstrap_interval(rows[0].dense.right)
    return told


def _ends(plan: Plan) -> tuple[float, float]:
    """The thresholds of a training that are farthest apart, dense attention left out."""
    sparse = [tau for tau in plan.thresholds if tau < 1.0]
    return min(sparse), max(sparse)


def _read(kept: dict[str, Any]) -> Row:
    outcomes = {name: Outcome(**kept[name]) for name in ("sparse", "dense", "random")}
    return Row(**outcomes, ends=[Outcome(**each) for each in kept["ends"]], log=kept["log"])


def _weights(source: Path) -> str:
    """Which weights a table is about, by what their file says of itself."""
    return hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
