"""Ways to train a small judge in the scripted world, each tested on battles of instances that it never saw."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from tersor._weights import fingerprint
from tersor.bench.runs import Finished, OnProgress
from tersor.opening.intjudge.calibration import calibration_error, fit_temperature, reliability
from tersor.opening.intjudge.config import IntJudgeConfig
from tersor.opening.intjudge.evaluation import Decided, blanked, decide
from tersor.opening.intjudge.lora import adapters
from tersor.opening.intjudge.pairs import Pair, balanced, content, flipped_at_random, pairs_of, split
from tersor.opening.intjudge.run import halves, tempered
from tersor.opening.intjudge.trainer import IntJudgeTrainer
from tersor.opening.intjudge.world import PROMPT, SEEN, UNSEEN, World
from tersor.opening.judging.local import LocalJudge
from tersor.opening.records import Label
from tersor.zoo import loading

UNTRAINED, ARENA, BOTH, COIN = "untrained", "arena", "arena + references", "the same, labels by a coin"
#: Way -> labels of people, in those of the plan; whether references are added; whether a coin decides; losses beside
#: cross-entropy.
ARMS: dict[str, dict[str, Any]] = {
    UNTRAINED: {},
    ARENA: {"labels": 1},
    BOTH: {"labels": 1, "references": True},
    COIN: {"labels": 1, "references": True, "coin": True},
    "references alone": {"references": True},
    "arena, four times the labels": {"labels": 4},
    "arena + references, ranking and swap losses": {"labels": 1, "references": True, "extras": 0.1},
}
_POINTS: dict[Label, float] = {"A": 1.0, "B": 0.0}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One training, whatever its way.

    Args:
        labels: Battles that people decided.
        ratio: Pairs from references for one of those, at most; as many without any vote.
        steps: Updates.
        rows: Of an update; half as many pairs.
        learning_rate: Peak of the cosine.
        rank: Of the adapter.
        instances: Tasks of the world, of which a fifth is held out.
    """

    labels: int = 10
    ratio: float = 120.0
    steps: int = 100
    rows: int = 32
    learning_rate: float = 2e-3
    rank: int = 32
    instances: int = 700


@dataclass
class Row:
    """One judge; shares are of battles that were asked about in both orders.

    Args:
        seen: Agreement on battles of generators of the training.
        unseen: On battles with others.
        colours: On answers of equal length that differ in one colour.
        blank: On those of ``seen`` and ``unseen`` with grey pictures; None where it was not asked.
        first_share: Share of questions in which the answer shown first won.
        consistent: Share of battles with the same winner in both orders.
        log_mass: Median log-probability of the four verdicts together.
        temperature: Fitted on half of the instances.
        errors: Calibration errors on the other half, as trained and with the temperature.
        bins: Confidence, share right and battles of each bin there.
        battles: Probability of the first answer with the temperature, its points by people, and whether both name the
            same winner.
        n: Battles of seen, unseen and colours.
        pairs: Pairs of the training from people and from references.
    """

    seen: float
    unseen: float
    colours: float
    blank: float | None
    first_share: float
    consistent: float
    log_mass: float
    temperature: float
    errors: list[float]
    bins: list[list[float]]
    battles: list[list[float]]
    n: list[int]
    pairs: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """Which table a progress file belongs to."""

    plan: Plan
    model: str
    battles: int
    weights: str


def run_table(
    model: str, plan: Plan, arms: Sequence[str], seeds: Sequence[int], *, n: int, progress: Path | None,
    on_progress: OnProgress = lambda name: None,
) -> dict[str, Row]:  # fmt: skip
    """Train and ask; ``"<way> / <seed>"`` -> what came of it.

    Args:
        model: Checkpoint to start from.
        plan: The training.
        arms: Of `ARMS`.
        seeds: Of worlds and trainings.
        n: Battles of each test set.
        progress: A file that keeps what is done; None keeps nothing.
        on_progress: Told what is being done.
    """
    location = loading.resolve(model)
    weights = fingerprint(Path(location))
    finished = Finished(progress, Job(plan, model, n, weights), lambda kept: Row(**kept))
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            for arm in arms:
                key = f"{arm} / {seed}"
                on_progress(key)
                finished.once(key, lambda arm=arm, seed=seed: train_arm(arm, location, plan, seed, n, Path(folder)))  # type: ignore[misc]
    return {f"{arm} / {seed}": finished.results[f"{arm} / {seed}"] for seed in seeds for arm in arms}


def train_arm(arm: str, location: str, plan: Plan, seed: int, n: int, folder: Path) -> Row:
    """One judge, trained and tested."""
    training, tests = data(plan, seed, n, folder, **{k: v for k, v in ARMS[arm].items() if k != "extras"})
    model, _ = loading.load(location, "cpu")
    processor = loading.load_processor(location)
    if training:
        extras = ARMS[arm].get("extras", 0.0)
        config = IntJudgeConfig(
            output_dir=str(folder / "unused"), max_steps=plan.steps, per_device_train_batch_size=plan.rows, seed=seed,
            learning_rate=plan.learning_rate, gradient_checkpointing=False, save_strategy="no", report_to=[],
            disable_tqdm=True, logging_strategy="no", rank_weight=extras, swap_weight=extras,
        )  # fmt: skip
        trainer = IntJudgeTrainer(
            model, training, config, PROMPT, processing_class=processor, peft_config=adapters(plan.rank, dropout=0.0)
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        model = trainer.model
    judge = LocalJudge(model, processor, PROMPT, name=arm, batch=16)
    row = measured(judge, tests, folder, blind=arm == BOTH)
    row.pairs = [sum(pair.kind == kind for pair in training) for kind in ("arena", "reference")]
    return row


def data(
    plan: Plan, seed: int, n: int, folder: Path, *, labels: int = 0, references: bool = False, coin: bool = False
) -> tuple[list[Pair], dict[str, list[Pair]]]:
    """Pairs to train on, and the test sets ``seen``, ``unseen`` and ``colours``, which are the same for every way."""
    world = World(folder, seed)
    instances = world.instances(plan.instances)
    unseen = [each.name for each in UNSEEN]
    arena = world.arena(instances, (*SEEN, *UNSEEN), 6 * plan.instances)
    sources = [arena, world.references(instances, SEEN)] if references else [arena]
    parts = split(sources, unseen=unseen, held_out=0.2, ratio=1e9, seed=seed)
    decided = [pair for pair in parts.training if pair.kind == "arena"][: labels * plan.labels]
    made = [pair for pair in parts.training if pair.kind == "reference"][: round(plan.ratio * plan.labels)]
    new = [pair for pair in parts.validation if {pair.verdict.a, pair.verdict.b} & set(unseen)]
    old = [pair for pair in parts.validation if pair not in new]
    training = balanced([*decided, *made], world.rng("order"))
    known = {content(pair.instance) for pair in parts.training}
    alike = pairs_of(world.colours_alone(8 * n, first=plan.instances), Counter())
    colours = [pair for pair in alike if content(pair.instance) not in known]
    return flipped_at_random(training, seed) if coin else training, {
        "seen": old[:n], "unseen": new[:n], "colours": colours[:n],
    }  # fmt: skip


def measured(judge: LocalJudge, tests: dict[str, list[Pair]], folder: Path, *, blind: bool) -> Row:
    """Ask a judge about all test sets, with grey pictures too if it is to be ``blind`` once."""
    found = {name: decide(judge, pairs) for name, pairs in tests.items()}
    mixed = [*tests["seen"], *tests["unseen"]]
    both = Decided(mixed, [*found["seen"].raw, *found["unseen"].raw], judge.id)
    blank = decide(judge, blanked(mixed, folder)) if blind else None
    fitted, tested = halves(both)
    temperature = fit_temperature(*fitted.scores())
    mended = tempered(tested, temperature)
    errors = [calibration_error(reliability(*each.chances())) for each in (tested, mended)]
    all_mended = tempered(both, temperature)
    battles = [
        [p, _POINTS.get(pair.label, 0.5), float((p > 0.5) == won)]
        for pair, p, won in zip(mixed, *all_mended.chances(), strict=True)
    ]
    return Row(
        seen=_value(found["seen"].agreement()), unseen=_value(found["unseen"].agreement()),
        colours=_value(found["colours"].agreement()),
        blank=None if blank is None else _value(blank.agreement()), first_share=_value(both.first_share()),
        consistent=_value(both.consistent()),
        log_mass=both.log_mass(), temperature=temperature, errors=errors,
        bins=[[each.confidence, each.right.value, each.n] for each in reliability(*mended.chances())],
        battles=battles, n=[len(pairs) for pairs in tests.values()],
    )  # fmt: skip


def _value(found: Any) -> float:
    return float(found.value)
