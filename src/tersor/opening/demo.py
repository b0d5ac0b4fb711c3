"""OpenING on opening-mini: is the known order of four generators found, and how much is a judge's bias worth?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tersor.bench.measure import Estimate
from tersor.bench.records import Record
from tersor.bench.report import Answer, Figure, Sample, Section
from tersor.bench.runs import DEMO_SEED, DemoResult, OnProgress, demo_records
from tersor.opening import example
from tersor.opening.example import ORDER, decide, fill
from tersor.opening.fits import fit_strengths
from tersor.opening.forest import forest
from tersor.opening.records import Verdict, from_one_order
from tersor.opening.scenes import faults
from tersor.opening.store import Store
from tersor.opening.summary import Told, summarize

SYSTEM = "opening"
#: Battles on each instance.
ROUNDS = example.ROUNDS


def run(on_progress: OnProgress) -> DemoResult:
    """Answer, judge and rank; ``on_progress`` is told what is being done."""
    with TemporaryDirectory() as folder, Store.open(Path(folder), create=True) as store:
        fill(store, seed=DEMO_SEED, rounds=ROUNDS, on_progress=on_progress)
        judge = decide(store, seed=DEMO_SEED, on_progress=on_progress)
        on_progress("ranking")
        told = summarize(store, judge)
        battles = {each.id: each for each in store.battles()}
        alone = [from_one_order(battles[row.battle], row) for row in store.raw(judge) if row.order == 0]
        rows = [(row["model"], row["elo"]) for row in told["models"]]
        section = Section(
            title="OpenING: answers in text and pictures, compared in pairs",
            intro=(
                "Four generators of a known order answer small tasks about coloured shapes, and every battle is "
                f"decided twice, with either answer first, by a program that counts faults ({judge}). It is no trained "
                "judge: what is shown is that the arena finds the order, and what its intervals say."
            ),
            figures=[Figure(forest(rows, "Elo of the four generators", ".0f"), "Elo with 95 % intervals.")],
            samples=[_sample(store)],
        )
        return DemoResult(_records(told, alone, judge), section)


def tau(order: Sequence[str], known: Sequence[str] = ORDER) -> float:
    """Kendall's tau of an order of models with the known one."""
    places = [known.index(model) for model in order]
    signs = [1 if a < b else -1 for at, b in enumerate(places) for a in places[:at]]
    return sum(signs) / len(signs)


def judge_order(order: Sequence[str], ranks: Sequence[int | None]) -> str:
    """The verdict: "holds" if the order is the known one and every rank is sure, "partly" if some are shared."""
    if tuple(order) != ORDER:
        return "fails"
    return "holds" if list(ranks) == list(range(1, len(ORDER) + 1)) else "partly"


def _records(told: Told, alone: Sequence[Verdict], judge: str) -> list[Record]:
    record = demo_records(SYSTEM, judge)
    models = sorted(told["models"], key=lambda row: -(row["theta"]["value"] or 0.0))
    order, ranks = [row["model"] for row in models], [row["rank"] for row in models]
    one = fit_strengths(alone, position=False)
    n, place = told["counts"]["decided"], told["position"]
    return [
        record(
            f"four generators, each battle in both orders, judged by {judge}",
            "Kendall's tau with the known order", "", tau(order), n, shapes="scripted generators and judge",
            claim="people rank the human answers first", claim_source="arena of 11 models (arXiv 2411.18499)",
            baseline=0.0, peer=tau([each.model for each in one.strengths]) if one else 0.0,
            peer_name="one order, no position term", verdict=judge_order(order, ranks),
        ),
        record(
            f"the same battles, judged by {judge}", "same winner in both orders", "share",
            _estimate(place["consistent"]), place["consistent_n"], shapes="scripted generators and judge",
        ),
        record(
            f"the same battles, judged by {judge}", "log odds of being shown first", "",
            _estimate(place["coefficient"], "95% sandwich"), told["counts"]["asked"], baseline=0.0,
            shapes="scripted generators and judge",
        ),
    ]  # fmt: skip


def _estimate(found: Told, kind: str = "95% bootstrap") -> Estimate:
    return Estimate(found["value"], found["low"], found["high"], kind)


def _sample(store: Store) -> Sample:
    """One instance with its answers, in words."""
    instance = next(each for each in store.instances() if len(each.gold) > 2)
    answers = []
    for model in ORDER:
        steps = store.outputs(model)[instance.uid]
        text = f"{len(steps)} steps, {sum(step.image is not None for step in steps)} pictures"
        wrong = faults(instance, steps)
        answers.append(Answer(model, f"{text}; {wrong:g} faults", wrong == 0))
    return Sample("one task, answered by all", " ".join(step.text for step in instance.inputs), answers)
