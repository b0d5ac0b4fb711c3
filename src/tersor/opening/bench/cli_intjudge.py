"""`tersor bench intjudge`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from tersor._console import spinner
from tersor._errors import TersorError
from tersor._lazy import require
from tersor.bench.runs import AsJson, ResumableOut, cell, progress_file, record_maker, report_records, show

if TYPE_CHECKING:
    from tersor.bench.measure import Estimate
    from tersor.bench.records import Record
    from tersor.opening.bench.intjudge import Row
    from tersor.opening.bench.panel import Panel

#: Figure of a judge -> its words in a record.
QUANTITIES = {
    "seen": "agreement, generators of the training",
    "unseen": "agreement, other generators",
    "colours": "agreement, equal length, one colour differs",
    "blank": "agreement, grey pictures",
    "first_share": "the answer shown first wins",
    "consistent": "same winner in both orders",
}  # fmt: skip
#: Figures of a judge's probabilities.
NUMBERS = {
    "log_mass": ("log-probability of the four verdicts", ""),
    "temperature": ("temperature", ""),
    "error_as_trained": ("calibration error, as trained", "share"),
    "error": ("calibration error, with temperature", "share"),
}


def bench_intjudge(
    model: Annotated[str, typer.Option(help="tiny-judge, or a folder that its recipe wrote.")] = "tiny-judge",
    arms: Annotated[
        list[str] | None, typer.Option("--arm", help="A way to train; may be repeated. All of them without it.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Worlds and trainings of each way.")] = 3,
    samples: Annotated[int, typer.Option(help="Battles of each test set of a seed.")] = 60,
    steps: Annotated[int, typer.Option(help="Updates of a training; 0 takes those of the table in the docs.")] = 0,
    out: ResumableOut = None,
    as_json: AsJson = False,
) -> None:
    """Train small judges on votes, with and without pairs from references, and test them where the truth is known."""
    require("trl", "rl")
    require("PIL.Image", "arena")
    from tersor.opening.bench.intjudge import ARMS, BOTH, Plan, run_table
    from tersor.opening.bench.panel import simulate

    if wrong := [name for name in arms or () if name not in ARMS]:
        raise TersorError(f"--arm {wrong[0]!r} must be one of {list(ARMS)}")
    for option, value, least in (("--seeds", seeds, 1), ("--samples", samples, 10), ("--steps", steps, 0)):
        if value < least:
            raise TersorError(f"{option} {value} must be at least {least}")
    plan = Plan(steps=steps) if steps else Plan()
    with progress_file(out) as progress:
        with spinner() as status:
            rows = run_table(
                model, plan, arms or list(ARMS), range(seeds), n=samples, progress=progress, on_progress=status.update
            )
        battles = [each for name, row in rows.items() if name.startswith(f"{BOTH} / ") for each in row.battles]
        panel = simulate(battles) if battles else None
        records = table_records(record_maker("intjudge", model=model, seed=0), rows, panel)
        report_records(records, out, as_json, lambda: print_rows(rows, panel))


def figures(rows: Sequence[Row]) -> dict[str, Estimate]:
    """What the table says of one way, each with its interval over seeds."""
    from tersor.bench.measure import over_seeds

    names = [*QUANTITIES, "log_mass", "temperature"]
    found = {
        name: over_seeds([getattr(row, name) for row in rows]) for name in names if getattr(rows[0], name) is not None
    }
    errors = {"error_as_trained": 0, "error": 1}
    return found | {name: over_seeds([row.errors[place] for row in rows]) for name, place in errors.items()}


def ways(rows: dict[str, Row]) -> dict[str, list[Row]]:
    """Way -> its judges, one a seed."""
    found: dict[str, list[Row]] = {}
    for key, row in rows.items():
        found.setdefault(key.rpartition(" / ")[0], []).append(row)
    return found


def table_records(make: Callable[..., Record], rows: dict[str, Row], panel: Panel | None) -> list[Record]:
    """Every figure of every way, and what the mixed panel is worth."""
    records = []
    for arm, own in ways(rows).items():
        seen, unseen, colours = (sum(row.n[place] for row in own) for place in range(3))
        counts = {"seen": seen, "unseen": unseen, "colours": colours, "first_share": 2 * (seen + unseen)}
        told = figures(own)
        for name, quantity in QUANTITIES.items():
            if name in told:
                records.append(make(arm, quantity, "share", told[name], counts.get(name, seen + unseen)))
        records += [make(arm, *NUMBERS[name], told[name], seen + unseen) for name in NUMBERS]
        for place, kind in enumerate(("people", "references")):
            pairs = sum(row.pairs[place] for row in own) / len(own)
            records.append(make(arm, f"pairs of the training from {kind}", "", pairs, len(own)))
    if panel is not None:
        item = f"{panel.people} people's votes and the judge on {panel.judged} battles more"
        records += [
            make(item, quantity, unit, value, panel.runs)
            for quantity, unit, value in (
                ("agreement of the judge", "share", panel.agreement),
                ("coverage of the 95 % interval", "share", panel.coverage),
                ("coverage, people alone", "share", panel.coverage_alone),
                ("coverage, judge alone", "share", panel.coverage_judge),
                ("shorter than people alone", "share", panel.shorter),
                ("votes that people alone would need", "votes", panel.worth),
            )
        ]  # fmt: skip
    return records


def print_rows(rows: dict[str, Row], panel: Panel | None) -> None:
    """A row a way, and a line on the mixed panel."""
    columns = ["way", "seen, %", "unseen, %", "colour alone, %", "first place, %", "both orders, %", "log mass"]
    lines = []
    for arm, own in ways(rows).items():
        told = figures(own)
        shares = [
            cell(told[name], ".1f", factor=100) for name in ("seen", "unseen", "colours", "first_share", "consistent")
        ]
        lines.append([arm, *shares, cell(told["log_mass"], ".2f")])
    show(columns, lines)
    if panel is not None:
        typer.echo(
            f"{panel.people} votes and the judge: covers in {panel.coverage.value:.1%} of {panel.runs} runs, "
            f"{panel.shorter:.0%} shorter than people alone; the judge agrees in {panel.agreement:.1%}"
        )
