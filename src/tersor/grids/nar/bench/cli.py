"""`tersor bench nar`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor._console import spinner
from tersor._errors import TersorError
from tersor.bench.runs import (
    AsJson,
    Finished,
    ResumableOut,
    cell,
    command_line,
    progress_file,
    record_maker,
    report_records,
    show,
    whole_numbers,
)
from tersor.zoo.loading import target_device

if TYPE_CHECKING:
    from tersor.bench.records import Record
    from tersor.grids.nar.bench.quality import CaptionScores, Locked, Settings, Speed
    from tersor.grids.samples import Quality

    Found = Mapping[str, tuple[Settings, Quality]]

#: The quantity that says how far samples are from what the tokenizer allows.
EXCESS = "distance above the floor over raster's"
_MODELS = ("tiny-nar", "tiny-nar-video", "tiny-nar-text")


def bench_nar(
    model: Annotated[str, typer.Option(help="'tiny-nar', 'tiny-nar-video' or 'tiny-nar-text'.")] = "tiny-nar",
    samples: Annotated[int, typer.Option(help="Samples of each decoding and seed; 0 leaves quality out.")] = 3000,
    seeds: Annotated[int, typer.Option(help="Seeds: 1, 2, and so on up to this one.")] = 3,
    validation: Annotated[int, typer.Option(help="Samples of another seed, to choose each model's settings.")] = 3000,
    batches: Annotated[str, typer.Option(help="Batch sizes to time; '' leaves speed out.")] = "1,4,16,64,256",
    repeats: Annotated[int, typer.Option(help="Rounds of the timing.")] = 9,
    device: Annotated[str, typer.Option(help="'cpu', 'cuda', ...; samples are judged on the CPU.")] = "cpu",
    out: ResumableOut = None,
    as_json: AsJson = False,
) -> None:
    """Compare NAR with token after token (raster), PAR-4X and ablations: passes, speed, Fréchet distance, accuracy."""
    sizes = whole_numbers("--batches", batches, least=1)
    if model not in _MODELS:
        raise TersorError(f"--model {model!r} must be one of {_MODELS}")
    if samples == 1 or samples < 0 or validation < 2 or seeds < 1 or repeats < 1:
        raise TersorError(
            f"--samples {samples} must be 0 or at least 2, --validation {validation} at least 2, --seeds {seeds} and "
            f"--repeats {repeats} at least 1"
        )
    if not samples and not sizes:
        raise TersorError("--samples 0 with --batches '' leaves nothing to measure")
    target = target_device(device)
    if model == "tiny-nar-text":
        if target.type != "cpu":
            raise TersorError("--device is not for captions, which are measured on the CPU")
        _bench_captions(model, samples, seeds, validation, out, as_json)
        return
    from tersor import zoo
    from tersor.grids.nar.bench.quality import Plan, decodings, locked, run_plan, time_decodings
    from tersor.grids.samples import Samples

    network: Any = zoo.load_model(model).to(target)
    video = len(network.config.grid_size) == 3
    tokenizer: Any = zoo.load_video_tokenizer(model) if video else zoo.load_image_tokenizer(model)
    judge = zoo.load_judge(zoo.judge_of(model))
    chosen = decodings(network, {kind: each.to(target) for kind, each in zoo.load_compared(model).items()})
    plan = Plan(model, tuple(each.name for each in chosen), samples, tuple(range(1, seeds + 1)), validation)
    with progress_file(out) as progress:
        finished = Finished(progress, plan, Samples.from_json)
        found, speeds = {}, []
        with spinner() as status:
            if samples:
                status.update(f"{chosen[0].name}: choosing settings, then {samples} samples a seed")
                for name, settings, quality in run_plan(plan, chosen, tokenizer, judge, finished):
                    found[name] = (settings, quality)
                    status.update(f"{name} done")
            for batch in sizes:
                status.update(f"timing, batch {batch}, {repeats} rounds")
                speeds.append(time_decodings(chosen, batch=batch, repeats=repeats, seed=0))
        facts = locked(zoo.path(model))
        records = nar_records(model, found, speeds, facts=facts, device=target.type, command=command_line())
        report_records(records, out, as_json, lambda: _print(found, speeds, facts))


def _bench_captions(model: str, samples: int, seeds: int, validation: int, out: Path | None, as_json: bool) -> None:
    """Whether pictures show what their caption says; there is nothing to time that tiny-nar does not show."""
    if not samples:
        raise TersorError("--samples 0 leaves nothing to measure of a model of captions")
    from tersor import zoo
    from tersor.grids.nar.bench.quality import CAPTION_CHOICES, VALIDATION_SEED, CaptionScores, score_captions
    from tersor.grids.nar.captions import Captions
    from tersor.grids.nar.pipeline import NARPipeline

    network: Any = zoo.load_model(model)
    pipeline = NARPipeline(network, zoo.load_image_tokenizer(model), zoo.load_text_encoder(model))
    (classifier, _), borders = zoo.load_judge(zoo.judge_of(model)), Captions.load(zoo.path(model))
    score = partial(score_captions, pipeline, classifier, borders)
    scores: dict[bool, CaptionScores] = {}
    with spinner() as status:
        status.update(f"choosing settings, {validation} samples each")
        shares = {
            each: score(each, samples=validation, seed=VALIDATION_SEED).share("all").value for each in CAPTION_CHOICES
        }
        settings = max(CAPTION_CHOICES, key=shares.__getitem__)
        for captioned in (True, False):
            parts = []
            for seed in range(1, seeds + 1):
                status.update(f"{samples} captions, seed {seed}")
                parts.append(score(settings, samples=samples, seed=seed, captioned=captioned).right)
            scores[captioned] = CaptionScores(
                {what: [one for part in parts for one in part[what]] for what in parts[0]}
            )
    records = caption_records(model, settings, scores[True], scores[False], command=command_line())
    report_records(records, out, as_json, lambda: _print_captions(records))


def caption_records(
    model: str, settings: Settings, captioned: CaptionScores, chance: CaptionScores, *, command: str
) -> list[Record]:
    """Shares of samples that show what was asked for.

    Args:
        model: What drew them.
        settings: Of the draws.
        captioned: Scores of samples of captions.
        chance: Scores of the same model without its caption, the baseline.
        command: What was run.
    """
    record = record_maker("nar", model=model, seed=1, shapes=f"trained, {settings}", command=command)
    return [
        record(
            f"captions: {what}",
            "shown as asked",
            "share",
            captioned.share(what),
            len(captioned.right[what]),
            baseline=chance.share(what).value,
        )
        for what in captioned.right
    ]


def _print_captions(records: list[Record]) -> None:
    rows = []
    for each in records:
        value, low, high, base = (
            100 * (number or 0.0) for number in (each.measured, each.low, each.high, each.baseline)
        )
        rows.append((each.item, f"{value:.1f} [{low:.1f}, {high:.1f}]", f"{base:.1f}"))
    show(("asked for", "shown, % [95%]", "without the caption, %"), rows)


def nar_records(
    model: str, found: Found, speeds: list[Speed], *, facts: Locked, device: str, command: str
) -> list[Record]:
    """Records of a run.

    Args:
        model: NAR's model.
        found: Settings and quality by decoding.
        speeds: Samples a second and NAR's speed-ups, by batch size.
        facts: What the recipe measured on real samples.
        device: Where models ran.
        command: What was run.
    """
    from tersor.bench.measure import over_seeds
    from tersor.grids.nar.bench.quality import NAR, RASTER, excess

    record = record_maker("nar", model=model, seed=1, shapes=f"trained, on {device}", command=command)
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
                ratio = {"baseline": 1.0, "peer": passes / speed.passes[NAR], "peer_name": "if time were passes"}
                records += [
                    record(item, "speed-up of NAR", "x", speed.over(name), n, **ratio),
                    record(item, "share of the pass ratio", "share", speed.realized(name), n, baseline=1.0),
                ]
    return records


def _print(found: Found, speeds: list[Speed], facts: Locked) -> None:
    from tersor.grids.nar.bench.quality import NAR

    if found:
        columns = ("decoding", "settings", "passes", "held-out nats a token", "Fréchet distance [95%]")
        rows = [
            (
                name,
                str(settings),
                f"{quality.passes():.0f}",
                f"{facts.losses[name]:.4f}",
                cell(quality.distance(), ".2f"),
                cell(quality.accuracy(), ".1f", factor=100),
            )
            for name, (settings, quality) in found.items()
        ]
        show((*columns, "class accuracy, % [95%]"), rows, names=2)
        typer.echo(f"floors of the distance: real {facts.floors['real']}")
        typer.echo(f"reconstructed {facts.floors['reconstructed']}")
    if speeds:
        others = [name for name in speeds[0].passes if name != NAR]
        titles = ("batch", f"{NAR}/s", *(f"{name}/s" for name in others), *(f"x {name}" for name in others))
        timed = [
            (
                str(speed.batch),
                *(f"{speed.rate(name).value:.4g}" for name in (NAR, *others)),
                *(f"{speed.over(name).value:.2f} ({100 * speed.realized(name):.0f} % of passes)" for name in others),
            )
            for speed in speeds
        ]
        show(titles, timed)
