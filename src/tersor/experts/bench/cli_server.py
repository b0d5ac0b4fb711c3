"""Records of the server for `tersor experts bench`: batches, a cold load, a soak, and a cluster."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tersor._lazy import require
from tersor.bench.runs import OnProgress, record_maker

if TYPE_CHECKING:
    from tersor.bench.records import Record

SYSTEM, SEED, HELD_OUT_SEED = "meswitch", 1, 2211
#: Of the soak: seconds, requests, and how many come at once.
SOAK = (600.0, 2000, 32)
#: Held-out prompts of each skill, and tokens of prompts that ZipCache compresses by default.
PROMPTS, LONG = 256, 320
CACHE = "bytes of the cache over those of 16 bits"


def server_records(parts: Sequence[str], repeats: int, on_progress: OnProgress) -> list[Record]:
    """Measure what ``parts`` name of "serving", "cold", "soak" and "cluster"."""
    require("fastapi", "serve")
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    found: list[Record] = []
    if "serving" in parts:
        found += _batches(repeats, on_progress)
    if "cold" in parts:
        found += _cold(max(3, repeats // 3), on_progress)
    if "soak" in parts:
        found += _soak(on_progress)
    if "cluster" in parts:
        require("ray.serve", "cluster")
        found += _cluster(repeats, on_progress)
    return found


def _batches(repeats: int, on_progress: OnProgress) -> list[Record]:
    from tersor.bench.measure import bootstrap_interval
    from tersor.experts.bench import serving as bench

    record = record_maker(SYSTEM, model=bench.MODEL, shapes="trained, 4 experts", seed=SEED)
    found: list[Record] = []
    total = bench.REQUESTS * bench.TOKENS
    for where, apart in (("16 requests at once", 0.0), (f"16 requests {1000 * bench.APART:.0f} ms apart", bench.APART)):
        on_progress(where)
        times = bench.time_batches(apart=apart, repeats=repeats, with_alone=not apart)
        alone = times.rounds.seconds(bench.ALONE).rate(total).value if not apart else None
        for kind in times.rounds.samples:
            item = f"{kind}: {where}"
            rate = times.rounds.seconds(kind).rate(total)
            found.append(record(item, "tokens a second", "tokens/s", rate, repeats, baseline=alone))
            first = bootstrap_interval([1000 * each for each in times.first[kind]])
            found.append(record(item, "time to the first token", "ms", first, repeats))
            if not apart and kind != bench.ALONE:
                ratio = times.rounds.ratio(bench.ALONE, kind)
                found.append(record(item, "speed over one at a time", "x", ratio, repeats, baseline=1.0))
    for kind in (bench.STATIC, bench.CONTINUOUS, bench.COMPRESSED, bench.EVERY):
        on_progress(f"answers: {kind}")
        nbytes, item = bench.CacheBytes(), f"{kind}: held-out prompts"
        right = bench.exact_answers(kind, PROMPTS, seed=HELD_OUT_SEED, nbytes=nbytes)
        share = bootstrap_interval([float(each) for each in right])
        found.append(record(item, "exact answers", "share", share, len(right), seed=HELD_OUT_SEED))
        if nbytes.dense:
            found.append(record(item, CACHE, "x", nbytes.share, len(right), baseline=1.0, seed=HELD_OUT_SEED))
    length = bench.bytes_of_long_prompts(bench.COMPRESSED, LONG)
    item = f"{bench.COMPRESSED}: prompts of {LONG} tokens"
    found.append(record(item, CACHE, "x", length.share, bench.REQUESTS, baseline=1.0))
    return found


def _cold(repeats: int, on_progress: OnProgress) -> list[Record]:
    import numpy as np

    from tersor.experts.bench.serving import time_cold_load

    on_progress("a cold load beside 8 streams")
    times = time_cold_load("50m", streams=8, repeats=repeats, seed=SEED)
    record = record_maker(SYSTEM, model="Llama 50m", shapes="random, 50m, float32, 8-bit deltas", seed=SEED)
    median = float(np.median(times.otherwise))
    item = "8 streams while an expert is loaded from its files"
    return [
        record(item, "bytes of the expert", "bytes", float(times.nbytes), repeats),
        record(item, "time of the load", "ms", 1000 * times.seconds, repeats),
        record(item, "median gap between tokens", "ms", 1000 * float(np.median(times.during)), len(times.during),
               baseline=1000 * median),
        record(item, "longest gap over the median without a load", "x", max(times.during) / median,
               len(times.during), peer=max(times.otherwise) / median, peer_name="without a load"),
    ]  # fmt: skip


def _soak(on_progress: OnProgress) -> list[Record]:
    import numpy as np

    from tersor.bench.measure import Estimate
    from tersor.experts.bench.soak import run_soak

    seconds, requests, together = SOAK
    soak = run_soak(seconds=seconds, requests=requests, concurrency=together, seed=SEED, on_progress=on_progress)
    item = f"{requests} requests in {seconds / 60:.0f} minutes, {together} at once"
    record = record_maker(SYSTEM, model="tiny-experts", shapes="trained, 4 experts", seed=SEED)
    low, middle, high = (1000 * float(np.quantile(soak.seconds, share)) for share in (0.25, 0.5, 0.75))
    found: list[Record] = [
        record(item, "time of an answer, all tries", "ms", Estimate(middle, low, high, "quartiles"), len(soak.seconds))
    ]

    def add(quantity: str, unit: str, value: float, n: int | None = None, **more: Any) -> None:
        found.append(record(item, quantity, unit, float(value), n, **more))

    for share in (95, 99):
        add(
            f"time of an answer, all tries, p{share}",
            "ms",
            1000 * float(np.quantile(soak.seconds, share / 100)),
            len(soak.seconds),
        )
    add("right answers", "", soak.right, soak.requests)
    add("broken requests that were refused as they should", "", soak.refused_right, soak.requests)
    add("wrong answers", "", soak.wrong, soak.requests)
    add("answers that never came", "", soak.lost, soak.requests)
    add("answers of 503", "", soak.statuses[503], sum(soak.statuses.values()))
    add("answers of 500", "", soak.statuses[500], sum(soak.statuses.values()))
    add("tokens a second", "tokens/s", soak.tokens / soak.wall, soak.requests)
    add("batches started again", "", soak.restarts)
    if soak.recovery is not None:
        add("from a killed thread to the next right answer", "s", soak.recovery)
    add("resident bytes at the end less at the start", "bytes", soak.resident[1] - soak.resident[0], baseline=0.0)
    add("memory of the process at the end over that after a fifth", "x", soak.memory[1] / soak.memory[0], baseline=1.0)
    add("experts that are still held", "", soak.held)
    add("requests or handlers that are left", "", soak.handlers)
    return found


def _cluster(repeats: int, on_progress: OnProgress) -> list[Record]:
    from tersor.bench.measure import bootstrap_difference
    from tersor.experts.bench import cluster as bench

    record = record_maker(SYSTEM, model="tiny-experts", shapes="trained, 4 experts", seed=SEED)
    found: list[Record] = []

    def add(item: str, quantity: str, unit: str, value: float, n: int | None = None, **more: Any) -> None:
        found.append(record(item, quantity, unit, float(value), n, **more))

    on_progress("starting two replicas")
    with bench.cluster(SEED) as (one, at, expected):
        for tokens in (1, bench.TOKENS):
            item = f"one request at a time, {tokens} token{'s' * (tokens > 1)} at most"
            on_progress(item)
            times = bench.time_latency(one, at, expected, tokens=tokens, repeats=repeats)
            for kind in (bench.ONE, bench.CLUSTER):
                found.append(record(f"{item}: {kind}", "time of an answer", "ms", times.seconds(kind) * 1000, repeats))
            added = bootstrap_difference(times.samples[bench.CLUSTER], times.samples[bench.ONE])
            found.append(record(item, "time that the cluster adds", "ms", added * 1000, repeats))
        asked = [list(expected)[n * 7 % len(expected)] for n in range(120)]
        item = f"4 experts, room for {bench.ROOM} in a replica"
        on_progress(item)
        seen = bench.load(at, asked, expected, together=6)
        add(item, "right answers", "", seen.right, len(asked))
        add(item, "experts on the device of a replica", "", bench.resident(at), peer=len({m for m, _ in expected}),
            peer_name="that Serve counts")  # fmt: skip
        item = "one expert, 24 requests at once"
        on_progress(item)
        seen, share = bench.shares(at, expected, requests=240, together=24)
        add(item, "right answers", "", seen.right, 240)
        add(item, "share of the busier replica", "", share, 240)
        item = "a replica is killed among 60 requests, 6 at once"
        on_progress(item)
        seen = bench.kill_one(at, expected, requests=60, together=6)
        for quantity, value in (("right answers", seen.right), ("streams that ended with an error object", seen.ended),
                                ("wrong answers", seen.wrong), ("answers of 500", seen.statuses[500]),
                                ("other errors", 60 - seen.statuses[200] - seen.statuses[500])):  # fmt: skip
            add(item, quantity, "", value, 60)
        add(item, "longest answer", "s", seen.longest, 60)
        add(item, "until there are two replicas again", "s", bench.wait_for_all(at))
    return found
