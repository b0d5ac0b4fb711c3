"""`tersor bench nar`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor._console import spinner
from tersor.bench.runs import command_line, report_records
from tersor.zoo import loading as _checkpoints

if TYPE_CHECKING:
    from tersor.bench.measure import Estimate
    from tersor.bench.records import Record
    from tersor.grids.nar.bench.quality import CaptionScores, Locked, Settings, Speed
    from tersor.grids.zipar.bench.quality import Quality

    Found = dict[str, tuple[Settings, Quality]]

#: The quantity that says how far samples are from what the tokenizer allows.
EXCESS = "distance above the floor over raster's"
_MODELS = ("tiny-nar", "tiny-nar-video", "tiny-nar-text")


def bench_nar(
    model: Annotated[str, typer.Option(help="'tiny-nar', 'tiny-nar-video' or 'tiny-nar-text'.")] = "tiny-nar",
    samples: Annotated[int, typer.Option(help="Samples a way and seed; 0 leaves quality out.")] = 3000,
    seeds: Annotated[int, typer.Option(help="Seeds: 1, 2, and so on up to this one.")] = 3,
    validation: Annotated[int, typer.Option(help="Samples of another seed, to choose each model's settings.")] = 3000,
    batches: Annotated[str, typer.Option(help="Batch sizes to time; '' leaves speed out.")] = "1,4,16,64,256",
    repeats: Annotated[int, typer.Option(help="Rounds of the timing.")] = 9,
    device: Annotated[str, typer.Option(help="'cpu', 'cuda', ...; samples are judged on the CPU.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Write records here; an interrupted run resumes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record a line instead of the table.")] = False,
) -> None:
    """Compare NAR with raster, PAR-4X and its ablations: passes, samples a second, Fréchet distance, accuracy."""
    sizes = [int(part) for part in batches.split(",") if part.strip().isdecimal()]
    if len(sizes) != len([part for part in batches.split(",") if part.strip()]) or min([1, *sizes]) < 1:
        raise ValueError(f"--batches {batches!r} must be whole numbers with commas between them, such as 1,16,256")
    if model not in _MODELS:
        raise ValueError(f"--model {model!r} must be one of {_MODELS}")
    if samples == 1 or samples < 0 or validation < 2 or seeds < 1 or repeats < 1:
        raise ValueError(
            f"--samples {samples} must be 0 or at least 2, --validation {validation} at least 2, --seeds {seeds} and "
            f"--repeats {repeats} at least 1"
        )
    if not samples and not sizes:
        raise ValueError("--samples 0 with --batches '' leaves nothing to measure")
    target = _checkpoints.target_device(device)
    if model == "tiny-nar-text":
        if target.type != "cpu":
            raise ValueError("--device is not for captions, which are measured on the CPU")
        _bench_captions(model, samples, seeds, validation, out, as_json)
        return
    from tersor import zoo
    from tersor.grids.nar.bench.quality import Plan, locked, run_plan, time_ways, ways

    network: Any = zoo.load_model(model).to(target)
    video = len(network.config.grid_size) == 3
    tokenizer: Any = zoo.load_video_tokenizer(model) if video else zoo.load_image_tokenizer(model)
    judge = zoo.load_judge(zoo.judge_of(model))
    chosen = ways(network, {kind: each.to(target) for kind, each in zoo.load_compared(model).items()})
    plan = Plan(model, tuple(way.name for way in chosen), samples, tuple(range(1, seeds + 1)), validation)
    progress = None if out is None else out.with_suffix(out.suffix + ".partial")
    found: Found = {}
    speeds: list[Speed] = []
    with spinner() as status:
        if samples:
            status.update(f"{chosen[0].name}: choosing settings, then {samples} samples a seed")
            for name, settings, quality in run_plan(plan, chosen, tokenizer, judge, progress):
                found[name] = (settings, quality)
                status.update(f"{name} done")
        for batch in sizes:
            status.update(f"timing, batch {batch}, {repeats} rounds")
            speeds.append(time_ways(chosen, batch=batch, repeats=repeats, seed=0))
    facts = locked(zoo.path(model))
    records = nar_records(model, found, speeds, facts=facts, device=target.type, command=command_line())
    report_records(records, out, as_json, lambda: _print(found, speeds, facts))
    if progress is not None:
        progress.unlink(missing_ok=True)


def _bench_captions(model: str, samples: int, seeds: int, validation: int, out: Path | None, as_json: bool) -> None:
    """Whether pictures show what their caption says; there is nothing to time that tiny-nar does not show."""
    if not samples:
        raise ValueError("--samples 0 leaves nothing to measure of a model of captions")
    from tersor import zoo
    from tersor.grids.nar.bench.quality import CAPTION_CHOICES, VALIDATION_SEED, CaptionScores, score_captions
    from tersor.grids.nar.captions import Captions
    from tersor.grids.nar.pipeline import NARPipeline

    network: Any = zoo.load_model(model)
    pipeline = NARPipeline(network, zoo.load_image_tokenizer(model), zoo.load_text_encoder(model))
    (classifier, _), borders = zoo.load_judge(zoo.judge_of(model)), Captions.load(zoo.path(model))
    found: dict[bool, list[CaptionScores]] = {}
    with spinner() as status:
        status.update(f"choosing settings, {validation} samples each")
        settings = max(
            CAPTION_CHOICES,
            key=lambda each: score_captions(
                pipeline, classifier, borders, each, samples=validation, seed=VALIDATION_SEED
            ).share("all").value,
        )  # fmt: skip
        for told in (True, False):
            found[told] = []
            for seed in range(1, seeds + 1):
                status.update(f"{samples} captions, seed {seed}")
                found[told].append(
                    score_captions(pipeline, classifier, borders, settings, samples=samples, seed=seed, told=told)
                )
    scores = {
        told: CaptionScores({what: [one for each in parts for one in each.right[what]] for what in parts[0].right})
        for told, parts in found.items()
    }
    records = caption_records(model, settings, scores[True], scores[False], command=command_line())
    report_records(records, out, as_json, lambda: _print_captions(records))


def caption_records(
    model: str, settings: Settings, told: CaptionScores, untold: CaptionScores, *, command: str
) -> list[Record]:
    """Shares of samples that show what was asked for; the baseline is the same model without its caption."""
    from tersor.bench.measure import as_fields, machine, versions
    from tersor.bench.records import Record

    return [
        Record(
            system="nar", item=f"captions: {what}", quantity="shown as asked", unit="share", claim=None,
            claim_source=None, baseline=untold.share(what).value, peer=None, peer_name=None, n=len(told.right[what]),
            seed=1, model=model, shapes=f"trained, {settings}", versions=versions(), machine=machine(), command=command,
            verdict=None, **as_fields(told.share(what)),
        )
        for what in told.right
    ]  # fmt: skip


def _print_captions(records: list[Record]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("asked for", "shown, % [95%]", "without the caption, %", box=box.SIMPLE_HEAD)
    for each in records:
        value, low, high, base = (
            100 * (number or 0.0) for number in (each.measured, each.low, each.high, each.baseline)
        )
        table.add_row(each.item, f"{value:.1f} [{low:.1f}, {high:.1f}]", f"{base:.1f}")
    Console().print(table)


def nar_records(
    model: str, found: Found, speeds: list[Speed], *, facts: Locked, device: str, command: str
) -> list[Record]:
    """Floors of the distance; by way its quality; by batch size the samples a second and NAR's speed-ups."""
    from tersor.bench.measure import as_fields, machine, over_seeds, versions
    from tersor.bench.records import Record
    from tersor.grids.nar.bench.quality import NAR, RASTER, excess

    shared: dict[str, Any] = {
        "system": "nar", "model": model, "shapes": f"trained, on {device}", "versions": versions(),
        "machine": machine(), "command": command, "verdict": None, "seed": 1, "claim": None, "claim_source": None,
    }  # fmt: skip

    def record(
        item: str, quantity: str, unit: str, value: Estimate | float, n: int, *, baseline: float | None = None,
        peer: float | None = None,
    ) -> Record:  # fmt: skip
        return Record(
            item=item, quantity=quantity, unit=unit, baseline=baseline, n=n, peer=peer,
            peer_name=None if peer is None else "if time were passes", **as_fields(value), **shared,
        )  # fmt: skip

    records: list[Record] = []
    if found:
        for name in ("real", "reconstructed"):
            distance, size = over_seeds(facts.floors[name]), facts.floors["images"]
            records.append(record(f"{name} samples: floor", "Fréchet distance", "", distance, size))
        floor, (_, raster) = over_seeds(facts.floors["reconstructed"]).value, found[RASTER]
        for name, (settings, quality) in found.items():
            n, item = len(quality.right), f"{name}: samples"
            loss, usual = facts.losses[name], facts.losses[RASTER]
            records += [
                record(f"{name}: real samples", "held-out loss", "nats/token", loss, facts.held_out, baseline=usual),
                record(item, "temperature", "", settings.temperature, n),
                record(item, "guidance", "", settings.guidance, n),
                record(item, "forward passes", "passes", quality.passes(), n, baseline=raster.passes()),
                record(item, "class accuracy", "share", quality.accuracy(), n, baseline=raster.accuracy().value),
                record(item, "accuracy against raster", "share", quality.against(raster), n, baseline=0.0),
                record(item, "Fréchet distance", "", quality.distance(), n, baseline=raster.distance().value),
                record(item, EXCESS, "x", excess(quality, raster, floor), n, baseline=1.0),
                record(item, "Fréchet joint distance", "", quality.joint(), n, baseline=raster.joint().value),
            ]  # fmt: skip
    for speed in speeds:
        for name, passes in speed.passes.items():
            n, item = len(speed.times.samples[name]), f"{name}: batch {speed.batch}"
            records += [
                record(item, "forward passes", "passes", float(passes), n),
                record(item, "samples per second", "samples/s", speed.rate(name), n, baseline=speed.rate(RASTER).value),
            ]
            if name != NAR:
                records += [
                    record(
                        item, "speed-up of NAR", "x", speed.over(name), n, baseline=1.0, peer=passes / speed.passes[NAR]
                    ),
                    record(item, "share of the pass ratio", "share", speed.realized(name), n, baseline=1.0),
                ]  # fmt: skip
    return records


def _print(found: Found, speeds: list[Speed], facts: Locked) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from tersor.grids.nar.bench.quality import NAR

    console = Console()
    if found:
        table = Table("way", "settings", box=box.SIMPLE_HEAD)
        for title in ("passes", "held-out nats a token", "Fréchet distance [95%]", "class accuracy, % [95%]"):
            table.add_column(title, justify="right")
        for name, (settings, quality) in found.items():
            distance, accuracy = quality.distance(), quality.accuracy()
            table.add_row(
                name,
                str(settings),
                f"{quality.passes():.0f}",
                f"{facts.losses[name]:.4f}",
                f"{distance.value:.2f} [{distance.low:.2f}, {distance.high:.2f}]",
                f"{100 * accuracy.value:.1f} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]",
            )
        console.print(table)
        console.print(f"floors of the distance: real {facts.floors['real']}")
        console.print(f"reconstructed {facts.floors['reconstructed']}")
    if speeds:
        table = Table("batch", box=box.SIMPLE_HEAD)
        others = [name for name in speeds[0].passes if name != NAR]
        for title in (f"{NAR}/s", *(f"{name}/s" for name in others), *(f"x {name}" for name in others)):
            table.add_column(title, justify="right")
        for speed in speeds:
            table.add_row(
                str(speed.batch),
                *(f"{speed.rate(name).value:.4g}" for name in (NAR, *others)),
                *(f"{speed.over(name).value:.2f} ({100 * speed.realized(name):.0f} % of passes)" for name in others),
            )
        console.print(table)
