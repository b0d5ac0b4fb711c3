"""RepAPQ on tiny-repvgg: agreement with floating point by bits, beside plain ranges and another library, and speed."""

from __future__ import annotations

from tersor import zoo
from tersor.bench.measure import Estimate, bootstrap_difference, wilson_interval
from tersor.bench.plots import Point, plot_quality_vs_bytes
from tersor.bench.records import Record
from tersor.bench.report import Figure, Section
from tersor.bench.runs import DEMO_SEED, DemoResult, OnProgress, demo_records, drawn
from tersor.bench.verdicts import judge_at_least, judge_speed_up
from tersor.ptq.bench.accuracy import METHODS, OURS, Method, Run, logits_of, quantized_run
from tersor.ptq.bench.data import Labelled, photo_crops
from tersor.ptq.bench.speed import FLOAT, INTEGER, Timing, measure
from tersor.ptq.config import RepAPQConfig

MODEL, SYSTEM, SHAPE = "tiny-repvgg", "ptq", "repvgg_a0"
PEER = "ONNX Runtime"
#: Photographs to calibrate with, the others are held out; squares of them for the first scales.
PHOTOS, FIRST, ITERATIONS, ROUNDS = 8, 64, 50, 9
SHOWN = {"w8a8": (OURS, "min-max", PEER), "w4a4": (OURS, "min-max")}
#: Agreement that 8 bits must reach, and how many times the processor time floating point must take.
LEAST_AGREEMENT, LEAST_SPEED_UP = 0.95, 2.5


def run(on_progress: OnProgress) -> DemoResult:
    """Quantize and time; ``on_progress`` is told what is being done."""
    net, photos = zoo.load_network(MODEL), zoo.photos()
    images = net.normalize(photo_crops(photos[:PHOTOS]))
    pixels = photo_crops(photos[PHOTOS:])
    exact = logits_of(net, net.normalize(pixels))
    # Squares of photographs have no classes; what counts is whether the answers stay as they are.
    data = Labelled(pixels, exact.argmax(1))
    methods = {method.name: method for method in METHODS}
    found: dict[tuple[str, str], Run] = {}
    for bits, names in SHOWN.items():
        for name in names:
            on_progress(f"{name}, {bits}: {len(images)} images to calibrate with")
            method: Method = methods[name]
            config = RepAPQConfig.of(bits, iterations=ITERATIONS, init_images=FIRST, seed=DEMO_SEED)
            found[bits, name] = quantized_run(method, net, images, config, data, exact)
    on_progress(f"{SHAPE} at 224 x 224: integers and floating point in turns")
    (timing,) = measure(SHAPE, [1], rounds=ROUNDS)
    records = [*(_quality_record(bits, found) for bits in SHOWN), *_speed_records(timing)]
    return DemoResult(records, _section(found, len(pixels)))


def _share(run: Run) -> Estimate:
    return wilson_interval(sum(run.same), len(run.same))


def _quality_record(bits: str, found: dict[tuple[str, str], Run]) -> Record:
    ours, peer = found[bits, OURS], SHOWN[bits][-1]
    share, other = _share(ours), _share(found[bits, peer])
    ahead = bootstrap_difference(list(map(float, ours.same)), list(map(float, found[bits, peer].same)))
    verdict = judge_at_least(share, LEAST_AGREEMENT, ahead=ahead) if bits == "w8a8" else None
    claim = {"claim": "about 1 point over earlier methods at 8 bits", "claim_source": "arXiv 2402.16121, abstract"}
    return demo_records(SYSTEM, MODEL)(
        f"squares of photographs, {bits}", "classified as in floating point", "share", share, len(ours.same),
        baseline=1.0, peer=other.value, peer_name=peer, verdict=verdict, **(claim if bits == "w8a8" else {}),
    )  # fmt: skip


def _speed_records(timing: Timing) -> list[Record]:
    speed_up = timing.times.ratio(FLOAT, INTEGER)
    record, item = demo_records(SYSTEM, SHAPE), f"{SHAPE}, 8 bits"
    verdict = judge_speed_up(speed_up, LEAST_SPEED_UP, least=1.0)
    size = timing.integer.nbytes / timing.exact.nbytes
    return [
        record(item, "speed-up over floating point, one thread", "x", speed_up, ROUNDS, baseline=1.0, verdict=verdict,
               shapes="random"),
        record(item, "file size", "share", size, 1, baseline=1.0, shapes="random"),
    ]  # fmt: skip


def _section(found: dict[tuple[str, str], Run], count: int) -> Section:
    return Section(
        "RepAPQ: a network of merged branches in integers",
        "Merged branches leave kernels with a few huge entries, and a grid that reaches those rounds the rest of their "
        "row away. RepAPQ searches the first grids by what reaches the output, trains an affine a channel that is "
        f"folded away, and supervises each block by the end of its stage. {count:,} squares of 32 x 32 pixels from "
        "photographs that it was not calibrated with; accuracies on labelled images are in the documentation.",
        figures=drawn(lambda: _plot(found)),
    )


def _plot(found: dict[tuple[str, str], Run]) -> Figure:
    points = []
    for (bits, name), each in found.items():
        share = _share(each) * 100
        points.append(Point(f"{name}, {bits}", float(bits[1]), share.value, share.low, share.high, name))
    plot = plot_quality_vs_bytes(
        points, x_label="bits of a weight", y_label="classified as in floating point, %", baseline=100.0,
        description="Agreement with the floating-point network by bits and method",
    )  # fmt: skip
    return Figure(plot, "Agreement by bits: up is better.")
