"""`tersor bench opening`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from tersor._console import spinner
from tersor._errors import TersorError
from tersor._lazy import require
from tersor._options import FOLDER
from tersor.bench.runs import AsJson, Out, record_maker, report_records, show, whole_numbers

if TYPE_CHECKING:
    from tersor.bench.records import Record
    from tersor.opening.compare import Comparison

#: Verdict of a comparison -> that of a record.
_VERDICTS = {"pass": "holds", "fail": "fails", "inconclusive": "partly"}


def bench_opening(
    windows: Annotated[str, typer.Option(help="Windows of ZipAR, in columns.")] = "9,4,2",
    margins: Annotated[str, typer.Option(help="How far below one half a score may be.")] = "0.02,0.05",
    samples: Annotated[int, typer.Option(help="Battles of each window against decoding token by token.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the images.")] = 0,
    run: Annotated[
        Path | None, typer.Option(metavar=FOLDER, help="Keep the run here, for `tersor opening report` and others.")
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Is ZipAR as good as decoding token by token? An arena of tiny-raster's images that its classifier judges."""
    require("PIL.Image", "arena")
    if not 10 <= samples <= 9990:
        raise TersorError(f"--samples {samples} must be from 10 to 9990")
    sizes = whole_numbers("--windows", windows, least=1)
    if not sizes or max(sizes) > 14 or len(set(sizes)) < len(sizes):
        raise TersorError(f"--windows {windows!r} must be different numbers from 1 to 14")
    limits = _margins(margins)
    if run is not None and run.exists() and any(run.iterdir()):
        raise TersorError(f"--run {run} must be a new or empty folder")
    from tersor.opening.bench.images import comparisons, contestants, judged
    from tersor.opening.store import Store

    with (
        spinner() as status,
        TemporaryDirectory() as temporary,
        Store.open(run or Path(temporary), create=True) as store,
    ):
        contestants(store, sizes, samples, seed, status.update)
        judge = judged(store, status.update)
        found = comparisons(store, judge, sizes, limits)
    records = comparison_records(record_maker("opening", model="tiny-raster", seed=seed), found, judge)
    report_records(records, out, as_json, lambda: print_comparisons(found, judge))


def _margins(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < each < 0.5 for each in found):
        raise TersorError(f"--margins {text!r} must be numbers above 0 and below 0.5, with commas between them")
    return found


def comparison_records(make: Callable[..., Record], found: Sequence[Comparison], judge: str) -> list[Record]:
    """A score and the power of each comparison, and of the score the verdict."""
    from tersor.bench.measure import Estimate

    records = []
    for each in found:
        assert each.score is not None and each.low is not None and each.high is not None
        item, n = f"{each.candidate} against {each.baseline}, margin {each.margin:g}", each.tally.battles
        score = Estimate(each.score, min(each.low, each.score), max(each.high, each.score), "90% t-interval")
        told = {"baseline": 0.5, "peer": each.least, "peer_name": f"least score; judged by {judge}"}
        records.append(make(item, "score", "", score, n, verdict=_VERDICTS[each.verdict], **told))
        records.append(make(item, "passes if equally good", "share", each.power() or 0.0, n))
        records.append(make(item, "votes for 80 % power", "votes", float(each.needed or 0), n))
    return records


def print_comparisons(found: Sequence[Comparison], judge: str) -> None:
    """One row a window and margin."""
    rows = [
        [each.candidate, f"{each.margin:g}", f"{each.score:.3f}", f"{each.low:.3f}", f"{each.high:.3f}", each.verdict,
         str(each.tally.battles), f"{100 * (each.power() or 0):.0f}", str(each.needed)]
        for each in found
    ]  # fmt: skip
    columns = ["against raster", "margin", "score", "low", "high", "verdict", "n", "power, %", "n for 80 %"]
    show(columns, rows, title=f"one-sided 95 % bounds; judged by {judge}")
