import gc
from collections import deque
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.bench.measure import (
    bootstrap_difference,
    bootstrap_interval,
    machine,
    storage_bytes,
    time_paired,
    versions,
    wilson_interval,
)


class Clock:
    """Seconds that pass only when a function under test says so."""

    def __init__(self):
        self.now = 0.0
        self.slowness = 1.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        def call():
            self.now += seconds * self.slowness

        return call


def test_known_costs_are_measured_and_compared():
    clock = Clock()
    times = time_paired({"fast": clock.work(2.0), "slow": clock.work(6.0)}, repeats=5, clock=clock)
    assert times.samples == {"fast": (2.0,) * 5, "slow": (6.0,) * 5}
    assert times.seconds("slow").value == 6.0
    speedup = times.ratio("slow", "fast")
    assert (speedup.low, speedup.value, speedup.high) == (3.0, 3.0, 3.0)


def test_pairing_cancels_a_machine_that_gets_slower():
    clock = Clock()
    calls = 0

    def slow_down(work):
        def call():
            nonlocal calls
            clock.slowness = 1.0 + calls // 2  # changes between rounds of two calls
            calls += 1
            work()

        return call

    functions = {"ours": slow_down(clock.work(1.0)), "theirs": slow_down(clock.work(4.0))}
    times = time_paired(functions, repeats=9, warmup=0, clock=clock)
    assert times.seconds("ours").high > 2 * times.seconds("ours").low, "the drift is not visible; the test is void"
    ratio = times.ratio("theirs", "ours")
    assert (ratio.low, ratio.value, ratio.high) == (4.0, 4.0, 4.0)


def test_rounds_hold_each_alternative_once_in_a_seeded_changing_order():
    def order_of_calls(seed):
        calls = []
        functions = {name: lambda name=name: calls.append(name) for name in "abc"}
        time_paired(functions, repeats=20, warmup=2, seed=seed)
        return ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]

    rounds = order_of_calls(seed=1)
    assert len(rounds) == 22
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 2
    assert rounds == order_of_calls(seed=1)
    assert rounds != order_of_calls(seed=2)


def test_quartiles_of_known_samples():
    clock = Clock()
    durations = iter([9.0, 1.0, 2.0, 3.0, 4.0, 5.0])  # the first is warm-up

    def call():
        clock.now += next(durations)

    estimate = time_paired({"f": call}, repeats=5, warmup=1, clock=clock).seconds("f")
    assert (estimate.low, estimate.value, estimate.high, estimate.interval) == (2.0, 3.0, 4.0, "quartiles")


def test_queued_work_is_counted_and_collection_is_off_meanwhile():
    clock = Clock()
    queued = 0.0
    collecting = []

    def launch():
        nonlocal queued
        queued += 3.0
        collecting.append(gc.isenabled())

    def synchronize():
        nonlocal queued
        clock.now += queued
        queued = 0.0

    times = time_paired({"kernel": launch}, repeats=2, clock=clock, synchronize=synchronize)
    assert times.samples["kernel"] == (3.0, 3.0)
    assert not any(collecting)
    assert gc.isenabled()


def test_collection_comes_back_after_an_error():
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        time_paired({"f": fail}, repeats=1)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("functions", "options"),
    [({}, {"repeats": 1}), ({"f": int}, {"repeats": 0}), ({"f": int}, {"repeats": 1, "warmup": -1})],
)
def test_timing_refuses_nonsense(functions, options):
    with pytest.raises(ValueError, match=r"at least one|must be >="):
        time_paired(functions, **options)


def test_ratio_refuses_unknown_names_and_a_clock_that_stands_still():
    times = time_paired({"f": int}, repeats=1, clock=lambda: 0.0)
    with pytest.raises(ValueError, match="timed were f"):
        times.ratio("f", "g")
    with pytest.raises(ValueError, match="took 0 s"):
        times.ratio("f", "f")


@dataclass
class Layer:
    keys: torch.Tensor
    note: str = "x"


class Slotted:
    __slots__ = ("tensor", "unset")

    def __init__(self, tensor):
        self.tensor = tensor


def floats(n):
    return torch.zeros(n, dtype=torch.float32)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: floats(10), 40),
        (lambda: {"a": floats(10), "b": [floats(1), (floats(2), deque([floats(3)]))]}, 64),
        (lambda: Layer(floats(5)), 20),
        (lambda: Slotted(floats(5)), 20),
        (lambda: torch.nn.Linear(3, 2), 4 * (3 * 2 + 2)),
        (lambda: torch.zeros(7, dtype=torch.uint8), 7),
        (lambda: torch.empty(1000, device="meta"), 0),
        (lambda: torch.empty(0), 0),
        (lambda: ["text", 3, None, torch.float32, len, gc], 0),
    ],
)
def test_bytes_of_simple_holders(build, expected):
    assert storage_bytes(build()) == expected


def test_views_cost_their_whole_storage_once():
    whole = floats(100)
    assert storage_bytes(whole[:1]) == 400
    assert storage_bytes([whole[:1], whole[50:], whole.view(10, 10)]) == 400
    assert storage_bytes([whole[:1].clone(), whole[:1].clone()]) == 8
    assert storage_bytes(floats(1).expand(1000)) == 4


def test_tied_weights_count_once_and_cycles_end():
    first, second = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    cycle = [first, second]
    cycle.append(cycle)
    assert storage_bytes(cycle) == 64


class Wrapper(torch.Tensor):
    """A subclass without a storage of its own, as quantized weights are."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, (1000, 1000), dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("counting bytes must compute nothing")


def test_wrapping_subclasses_count_what_they_wrap():
    wrapped = Wrapper(torch.zeros(12, dtype=torch.uint8), floats(1))
    assert storage_bytes({"layer": wrapped}) == 16


def test_bytes_of_a_transformers_cache_grow_with_its_tokens():
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), layer_idx=0)
    assert storage_bytes(cache) == 2 * (2 * 5 * 4) * 4


def test_bootstrap_of_normal_samples_covers_the_true_mean_about_95_times_in_100():
    generator = np.random.default_rng(7)
    trials = 400
    hits = 0
    for trial in range(trials):
        estimate = bootstrap_interval(generator.normal(3.0, 2.0, size=40), n_boot=400, seed=trial)
        hits += estimate.low <= 3.0 <= estimate.high
    # Percentile intervals of 40 samples cover 93 to 95 %; the standard error of 400 trials is 1.1 points.
    assert 0.90 <= hits / trials <= 0.98


def test_bootstrap_width_matches_the_standard_error():
    samples = np.random.default_rng(0).normal(size=2000)
    estimate = bootstrap_interval(samples)
    expected = 2 * 1.96 * samples.std() / np.sqrt(samples.size)
    assert estimate.high - estimate.low == pytest.approx(expected, rel=0.05)
    assert estimate.interval == "95% bootstrap"
    assert bootstrap_interval(samples, level=0.5).interval == "50% bootstrap"


def test_seed_decides_the_interval_and_blocks_do_not_change_what_is_sampled(monkeypatch):
    samples = np.random.default_rng(0).normal(size=50)
    assert bootstrap_interval(samples, seed=3) == bootstrap_interval(samples, seed=3)
    assert bootstrap_interval(samples, seed=3) != bootstrap_interval(samples, seed=4)
    whole = bootstrap_interval(samples, seed=3)
    monkeypatch.setattr("tersor.bench.measure._BLOCK", 1000)
    blocks = bootstrap_interval(samples, seed=3)
    assert (blocks.low, blocks.high) == pytest.approx((whole.low, whole.high), abs=1e-12)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_the_mean_lies_inside_its_interval_and_the_interval_inside_the_samples(samples):
    estimate = bootstrap_interval(samples, n_boot=50)
    assert estimate.low <= estimate.value <= estimate.high
    assert estimate.value == pytest.approx(np.mean(samples))
    slack = 1e-9 * max(1.0, *map(abs, samples))
    assert min(samples) - slack <= estimate.low and estimate.high <= max(samples) + slack


@pytest.mark.parametrize("samples", [[0.1], [0.1] * 3, [1.0] * 40])
def test_one_or_equal_samples_have_no_width(samples):
    estimate = bootstrap_interval(samples)
    assert estimate.low == pytest.approx(estimate.high)
    assert estimate.value == pytest.approx(samples[0])


def test_pairing_finds_a_difference_that_unpaired_intervals_hide():
    difficulty = np.random.default_rng(1).normal(0, 10, size=60)
    a, b = difficulty + 0.5, difficulty + np.random.default_rng(2).normal(0, 0.1, size=60)
    paired = bootstrap_difference(a, b)
    assert paired.low > 0.4 and paired.high < 0.6
    assert bootstrap_interval(a).low < bootstrap_interval(b).high, "the intervals overlap; pairing is what decides"
    opposite = bootstrap_difference(b, a)
    assert (opposite.low, opposite.high) == pytest.approx((-paired.high, -paired.low), abs=0.02)


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")], [float("inf")], [[1.0, 2.0]]])
def test_bootstrap_refuses_samples_it_cannot_average(bad):
    with pytest.raises(ValueError, match=r"non-empty|nan|inf"):
        bootstrap_interval(bad)


def test_bootstrap_refuses_other_nonsense():
    with pytest.raises(ValueError, match="equal lengths; got 1 and 2"):
        bootstrap_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval([1.0], level=95)
    with pytest.raises(ValueError, match="n_boot"):
        bootstrap_interval([1.0], n_boot=0)


def test_machine_and_versions_say_what_figures_depend_on(monkeypatch):
    monkeypatch.setattr("platform.node", lambda: pytest.fail("a record names no host"))
    description = machine()
    assert set(description) == {"cpu", "cores", "threads", "os", "gpu"}
    assert description["threads"] == torch.get_num_threads()
    assert isinstance(description["cores"], int) and description["cores"] >= 1
    assert versions()["torch"].startswith(torch.__version__.split("+")[0])
    assert {"python", "tersor", "transformers", "numpy"} <= set(versions())


def test_a_wilson_interval_is_the_score_test_turned_around() -> None:
    """Its ends are the shares p with (share - p)^2 = z^2 p (1 - p) / n."""
    for hits, n in ((0, 10), (3, 10), (500, 1000), (40, 40)):
        found = wilson_interval(hits, n)
        for end in (found.low, found.high):
            if 0 < end < 1:
                assert (found.value - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / n)
        assert found.low <= found.value <= found.high
    assert wilson_interval(40, 40).low < 0.95
    for hits, n in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError, match="between 0 and n"):
            wilson_interval(hits, n)
