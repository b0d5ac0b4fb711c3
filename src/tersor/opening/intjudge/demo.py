"""IntJudge on the scripted world: tiny-judge and the model that it was trained from, on battles of a new seed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from tersor.bench.measure import Estimate
from tersor.bench.records import Record
from tersor.bench.report import Figure, Section
from tersor.bench.runs import DEMO_SEED, DemoResult, OnProgress, demo_records, drawn
from tersor.opening.intervals import Interval
from tersor.opening.intjudge.calibration import reliability
from tersor.opening.intjudge.evaluation import Decided, blanked, decide
from tersor.opening.intjudge.pairs import Pair, balanced, pairs_of
from tersor.opening.intjudge.report import reliability_plot
from tersor.opening.intjudge.world import PROMPT, SEEN, UNSEEN, World
from tersor.opening.judging.local import LocalJudge
from tersor.zoo import loading

MODEL = "tiny-judge"
#: Battles that both are asked about, in both orders.
BATTLES = 120
#: Least agreement of a judge, and how much of it must come from the pictures.
LEAST, BY_PICTURES = 0.8, 0.1


def run(on_progress: OnProgress) -> DemoResult:
    """Ask both about the same battles; ``on_progress`` is told what is being done."""
    with TemporaryDirectory() as folder:
        pairs = battles(Path(folder), BATTLES)
        on_progress(f"{MODEL}: {len(pairs)} battles")
        judge = LocalJudge.from_pretrained(MODEL, device="cpu", batch=16)
        after = decide(judge, pairs)
        on_progress(f"{MODEL}: the same without pictures")
        blank = decide(judge, blanked(pairs, Path(folder)))
        on_progress("the model before the training")
        base, _ = loading.load(loading.resolve(MODEL), "cpu")
        before = decide(LocalJudge(base, judge.processor, PROMPT, name="base", batch=16), pairs)
    bins = reliability(*after.chances())
    section = Section(
        title="IntJudge: a judge that was trained on battles",
        intro=(
            f"A Qwen2-VL of a million parameters with an adapter decides {len(pairs)} battles of small pictures in "
            "both orders. It was trained on votes, and on pairs in which one answer had the gold answer at hand. It "
            "knows this world alone, and is no IntJudge-7B."
        ),
        figures=drawn(
            lambda: Figure(
                reliability_plot(bins, MODEL),
                "How often the winner is right against the probability that the judge gives it: on the line it can be "
                "believed.",
            )
        ),
    )
    return DemoResult(_records(before, after, blank), section)


def battles(folder: Path, n: int) -> list[Pair]:
    """Battles of all generators on instances of a seed of the demo's own."""
    world = World(folder, DEMO_SEED)
    source = world.arena(world.instances(n), (*SEEN, *UNSEEN), n)
    return balanced(pairs_of(source, Counter()), world.rng("order"))


def judge(agreement: float, blank: float, by_chance: float) -> str:
    """The verdict: "holds" for a judge that agrees often, and by what it sees; "fails" where chance does as well."""
    if agreement <= max(by_chance, 0.5):
        return "fails"
    return "holds" if agreement >= LEAST and agreement - blank >= BY_PICTURES else "partly"


def _records(before: Decided, after: Decided, blank: Decided) -> list[Record]:
    record = demo_records("intjudge", MODEL)
    n, item = len(after.pairs), "battles of the scripted world, in both orders"
    found, base, blind = (_estimate(each.agreement()) for each in (after, before, blank))
    return [
        record(
            item, "same winner as people", "share", found, n, claim=0.8242,
            claim_source="IntJudge-7B, FDT on 4,302 battles, from 0.6161 (arXiv 2411.18499)", baseline=base.value,
            peer=blind.value, peer_name="the same judge, grey pictures",
            verdict=judge(found.value, blind.value, base.value),
        ),
        record(item, "the answer shown first wins", "share", _estimate(after.first_share()), 2 * n, baseline=0.5,
               peer=_estimate(before.first_share()).value, peer_name="before the training"),
        record(item, "log-probability of the four verdicts", "", after.log_mass(), 2 * n, baseline=before.log_mass()),
    ]  # fmt: skip


def _estimate(found: Interval | None) -> Estimate:
    assert found is not None  # there are battles
    return Estimate(found.value, found.low, found.high, "95% bootstrap")
