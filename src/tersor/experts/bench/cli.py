"""`tersor experts bench`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor._console import spinner
from tersor._errors import TersorError
from tersor.bench.runs import AsJson, OnProgress, Out, record_maker, report_records, show

if TYPE_CHECKING:
    from tersor.bench.records import Record

#: What can be measured: time on random weights of real shapes, and quality on tiny-experts.
PARTS = ("decode", "switch", "mixed", "registered", "load", "quality", "router")
#: And of the server, where it is asked for: batches, a load beside streams, ten minutes of misuse, a cluster.
SERVER = ("serving", "cold", "soak", "cluster")
COUNTS = (1, 2, 4, 8, 16)
SYSTEM, SEED = "meswitch", 1
#: Prompts of `quality`, requests of `router`, and the seed that draws them: no training and no choice of a setting did.
PROMPTS, REQUESTS, HELD_OUT_SEED = 1024, 800, 2211
HARDEST = "add"


def bench_experts(
    what: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join((*PARTS, *SERVER))}; may be repeated; by default all but the last four."),
    ] = None,
    shape: Annotated[str, typer.Option(help="'1b', '100m' or 'tiny': sizes of the random model that is timed.")] = "1b",
    bits: Annotated[int, typer.Option(help="Bits of the timed deltas: 1, 2, 3, 4 or 8.")] = 2,
    repeats: Annotated[int, typer.Option(help="Rounds of each timing.")] = 15,
    threads: Annotated[int, typer.Option(help="Threads of the timed model.")] = 1,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure experts: time per token, switches, mixed batches, loading; quality by bits and channels; the router."""
    parts = what or list(PARTS)
    if wrong := [part for part in parts if part not in PARTS + SERVER]:
        raise TersorError(f"--what {wrong[0]!r} must be one of {PARTS + SERVER}")
    if repeats < 1 or threads < 1:
        raise TersorError(f"--repeats {repeats} and --threads {threads} must be at least 1")
    from tersor.experts.config import DeltaConfig

    config = DeltaConfig(bits=bits)
    import torch

    from tersor.experts.bench.speed import SHAPES

    if shape not in SHAPES:
        raise TersorError(f"--shape {shape!r} must be one of {tuple(SHAPES)}")
    records: list[Record] = []
    with spinner() as status:
        if set(parts) - {"quality", "router", *SERVER}:
            torch.set_num_threads(threads)
            records += _speed(parts, shape, config, repeats, status.update)
        if "quality" in parts:
            records += _quality(status.update)
        if "router" in parts:
            records += _router(status.update)
        if set(parts) & set(SERVER):
            from tersor.experts.bench.cli_server import server_records

            torch.set_num_threads(threads)
            records += server_records(parts, repeats, status.update)
    report_records(records, out, as_json, lambda: _print(records))


def _speed(parts: list[str], shape: str, config: Any, repeats: int, on_progress: OnProgress) -> list[Record]:
    from transformers.utils import logging

    from tersor.bench.measure import bootstrap_interval
    from tersor.experts.bench import speed as bench
    from tersor.experts.host import ExpertHost

    logging.disable_progress_bar()
    found: list[Record] = []
    label = f"random, {shape}, bfloat16, {config.bits}-bit deltas, {config.num_salient} salient channels"
    record = record_maker(SYSTEM, seed=SEED, shapes=label, model=f"Llama {shape}")

    def add(*measured: Any, **fields: Any) -> None:
        found.append(record(*measured, **fields))

    if set(parts) & {"decode", "switch", "mixed", "registered"}:
        on_progress(f"a random model of shape {shape}")
        model = bench.random_model(shape, seed=SEED)
        host = ExpertHost(model)
        size = sum(each.nbytes for each in model.parameters())
        names = [f"expert-{number}" for number in range(4)]
        hashes = bench.base_hashes(model)
        for number, name in enumerate(names if {"switch", "mixed"} & set(parts) else names[:1]):
            host.load_expert(name, bench.random_expert(model, config, seed=number, hashes=hashes), pin=True)
        share = sum(host.memory_report().experts[names[0]].values()) / size
    if "decode" in parts:
        on_progress(f"decoding, {repeats} rounds")
        times = bench.time_decoding(host, names[0], tokens=2, repeats=repeats)
        add("decoding one row", "time per token over the base's", "x", times.ratio(bench.EXPERT, bench.BASE), repeats,
            baseline=1.0, peer=1 + share, peer_name="if time were bytes")  # fmt: skip
        for who in (bench.BASE, bench.EXPERT):
            seconds = times.seconds(who)
            add(f"decoding one row: {who}", "time per token", "ms", seconds * 500, repeats)
    if "switch" in parts:
        on_progress("switching")
        switches = bench.time_switches(host, names, repeats=1000)
        add("switching among resident experts", "time of a switch", "ms",
            switches.seconds(bench.EXPERT) * 1000, len(switches.samples[bench.EXPERT]))  # fmt: skip
    if "mixed" in parts:
        on_progress(f"a batch of 8 rows over 4 experts, {repeats} rounds")
        times = bench.time_mixing(host, names, rows=8, repeats=repeats)
        ratio = times.ratio(bench.SEQUENTIAL, bench.MIXED)
        add("8 rows of 4 experts", "time of four passes over that of one batch", "x", ratio, repeats, baseline=1.0)
        for who in (bench.MIXED, bench.SEQUENTIAL):
            add(f"8 rows of 4 experts: {who}", "time per token of all rows", "ms",
                times.seconds(who) * 1000, repeats)  # fmt: skip
    if "registered" in parts:
        host.close()
        host = ExpertHost(model)
        deltas = (bench.random_expert(model, config, seed=n, hashes=hashes) for n in range(max(COUNTS)))
        on_progress(f"decoding while up to {max(COUNTS)} experts are registered")
        by_count = bench.time_registered(host, deltas, COUNTS, tokens=2, repeats=max(3, repeats // 2))
        first = None
        for count, each in by_count.items():
            rate = bootstrap_interval([2 / seconds for seconds in each])
            first = first or rate.value
            add(f"{count} experts registered", "tokens per second", "tokens/s", rate, len(each), baseline=first)
    if "load" in parts:
        on_progress("loading from disk")
        with tempfile.TemporaryDirectory() as folder:
            times, sizes = bench.time_loading(
                Path(folder), "100m" if shape == "1b" else shape, config, seed=SEED, repeats=max(3, repeats // 3)
            )
        n = len(times.samples[bench.DELTA])
        bytes_ratio = sizes[bench.WHOLE] / sizes[bench.DELTA]
        for what, suffix in (("until loaded", ", load"), ("until the first token", "")):
            ratio = times.ratio(f"{bench.WHOLE}{suffix}", f"{bench.DELTA}{suffix}")
            add(f"from cold files {what}", "time of a whole model over that of a delta", "x", ratio, n, baseline=1.0,
                peer=bytes_ratio, peer_name="if time were bytes")  # fmt: skip
            for who in (bench.DELTA, bench.WHOLE):
                add(f"from cold files {what}: {who}", "time", "ms", times.seconds(who + suffix) * 1000, n)
    return found


def _quality(on_progress: OnProgress) -> list[Record]:
    from tersor.experts.bench.quality import (
        MODEL,
        Family,
        planted_recalls,
        quality_table,
    )

    family = Family.load()
    found: list[Record] = []
    expert_bytes = 2 * sum(p.numel() for p in family.experts[HARDEST].parameters())
    record = record_maker(SYSTEM, model=MODEL, shapes=f"trained, expert {HARDEST}", seed=HELD_OUT_SEED)
    for row, kept in quality_table(family, HARDEST, n=PROMPTS, seed=HELD_OUT_SEED):
        on_progress(row)
        n = len(kept.right)
        found += [
            record(row, "exact answers", "share", kept.accuracy(), n, baseline=1.0),
            record(row, "divergence from the expert", "nats per token", kept.kl(), n, baseline=0.0),
            record(row, "bytes beside the base", "bytes", float(kept.nbytes), n, baseline=float(expert_bytes)),
        ]
    for (selection, k), (share, total) in planted_recalls(family).items():
        on_progress(f"planted channels by {selection}")
        item = f"by {selection}, k={k}"
        shapes = "trained, all experts"
        found.append(
            record(item, "planted channels found", "share", share, total, shapes=shapes, seed=SEED, baseline=1.0)
        )
    return found


def _router(on_progress: OnProgress) -> list[Record]:
    from tersor.experts.bench.quality import MODEL
    from tersor.experts.bench.routing import route_requests

    found: list[Record] = []
    record = record_maker(SYSTEM, model=MODEL, seed=HELD_OUT_SEED)
    for unseen in (False, True):
        where = "unseen templates" if unseen else "templates of the training"
        on_progress(where)
        results = route_requests(unseen=unseen, n=REQUESTS, seed=HELD_OUT_SEED)
        cheap = results["n-grams"]
        for who, each in results.items():
            end = each.end_task
            assert end is not None  # requests say who answers them right
            peer = {"peer": cheap.accuracy.value, "peer_name": "n-grams"} if who != "n-grams" else {}
            found += [
                record(f"{who}: {where}", "right expert", "share", each.accuracy, each.n, **peer),
                record(f"{who}: {where}", "calibration error", "", each.calibration_error, each.n),
                record(f"{who}: {where}", "time of a request", "ms", each.seconds * 1000, each.n),
                record(f"{who}: {where}", "answered right", "share", end.routed, each.n, baseline=end.oracle.value,
                        peer=end.best_single.value, peer_name=f"always {end.best_name}"),
                record(f"{who}: {where}", "answered right, less the best choice", "share", end.gap, each.n,
                        baseline=0.0),
                *(
                    record(f"{who}: {where}, requests for {name}", "right expert", "share", share,
                            sum(each.confusion[place]))
                    for place, (name, share) in enumerate(each.recall.items())
                ),
            ]  # fmt: skip
    return found


def _print(records: list[Record]) -> None:
    from tersor.bench.scoreboard import format_interval, format_number, format_value

    rows = (
        (each.item, each.quantity, format_value(each.measured, each.unit), format_interval(each),
         format_number(each.baseline))
        for each in records
    )  # fmt: skip
    show(("what", "quantity", "measured", "spread", "to compare with"), rows, names=2)
