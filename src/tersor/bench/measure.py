"""Time in paired rounds, bytes that are really allocated, and intervals by resampling."""

from __future__ import annotations

import gc
import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tersor._errors import TersorError
from tersor.bench._storage import storage_bytes

__all__ = [
    "Estimate",
    "PairedTimes",
    "bootstrap_difference",
    "bootstrap_interval",
    "machine",
    "over_seeds",
    "seed_of",
    "storage_bytes",
    "time_paired",
    "versions",
]

_Floats = npt.NDArray[np.float64]
# Resamples are drawn in blocks of at most this many indices, so that memory does not grow with the sample.
_BLOCK = 4_000_000
# Student's t at 97.5 % by degrees of freedom, for intervals over seeds.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Estimate:
    """A measured value with its interval; ``low <= value <= high`` always holds.

    ``interval`` names the kind of interval in the words that a record takes: "95% bootstrap" or "quartiles".
    """

    value: float
    low: float
    high: float
    interval: str

    def __mul__(self, factor: float) -> Estimate:
        """The same in a unit that is ``1 / factor`` times as large."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor, self.interval)

    def rate(self, count: float = 1.0) -> Estimate:
        """``count`` things in these seconds, as things a second."""
        return Estimate(count / self.value, count / self.high, count / self.low, self.interval)


def as_fields(value: Estimate | float) -> dict[str, Any]:
    """``value`` as the fields of a record; a plain number is exact and has no interval."""
    if isinstance(value, Estimate):
        return {"measured": value.value, "low": value.low, "high": value.high, "interval": value.interval}
    return {"measured": float(value), "low": None, "high": None, "interval": None}


@dataclass(frozen=True)
class PairedTimes:
    """Seconds per call: ``samples[name][i]`` was measured in round ``i``, beside all other ``[i]``."""

    samples: Mapping[str, tuple[float, ...]]

    def seconds(self, name: str) -> Estimate:
        """Median seconds of ``name`` with its quartiles. Raises `ValueError` for an unknown name."""
        low, value, high = np.quantile(self._of(name), [0.25, 0.5, 0.75])
        return Estimate(float(value), float(low), float(high), "quartiles")

    def ratio(self, numerator: str, denominator: str, *, n_boot: int = 10_000, seed: int = 0) -> Estimate:
        """Median over rounds of ``numerator`` time / ``denominator`` time, with its 95 % bootstrap interval.

        ``ratio("baseline", "ours")`` is the speed-up of ours. Both times of a quotient come from one round,
        so a machine that is slow for a while slows both.
        Raises `ValueError` for an unknown name, or if a time is zero.
        """
        above, below = self._of(numerator), self._of(denominator)
        if not np.all(below > 0):
            raise TersorError(f"a call of {denominator!r} took 0 s by this clock; let it do more work per call")
        return _bootstrap(above / below, np.median, level=0.95, n_boot=n_boot, seed=seed)

    def _of(self, name: str) -> _Floats:
        if name not in self.samples:
            raise TersorError(f"no alternative is named {name!r}; timed were {', '.join(self.samples)}")
        return np.asarray(self.samples[name], dtype=np.float64)


def time_paired(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    seed: int = 0,
    synchronize: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> PairedTimes:
    """Time the alternatives in turns: every round calls each once, in an order shuffled by ``seed``.

    ``warmup`` rounds come first and are not recorded, then ``repeats`` rounds. Garbage collection is off
    while a call runs. ``synchronize`` is called before the clock is read, so that queued work counts; by
    default it is `torch.cuda.synchronize` where there is a CUDA device. ``clock`` returns seconds.

    Raises `ValueError` if there is nothing to time, if ``repeats`` is below 1 or ``warmup`` below 0.
    """
    if not functions:
        raise TersorError("functions is empty; give at least one alternative to time")
    if repeats < 1 or warmup < 0:
        raise TersorError(f"got repeats={repeats} and warmup={warmup}; repeats must be >= 1 and warmup >= 0")
    if synchronize is None:
        synchronize = torch.cuda.synchronize if torch.cuda.is_available() else _nothing_queued
    shuffler = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    with _no_garbage_collection():
        for round_number in range(warmup + repeats):
            order = list(functions)
            shuffler.shuffle(order)
            for name in order:
                seconds = _time_once(functions[name], synchronize, clock)
                if round_number >= warmup:
                    samples[name].append(seconds)
            gc.collect(1)  # what this round left behind; a full collection would cost more than most calls
    return PairedTimes({name: tuple(times) for name, times in samples.items()})


def bootstrap_interval(
    samples: Sequence[float] | _Floats, *, level: float = 0.95, n_boot: int = 10_000, seed: int = 0
) -> Estimate:
    """Mean of ``samples`` with its percentile bootstrap interval at ``level``; the seed decides it exactly.

    One sample, or samples that are all equal, give an interval of no width: resampling cannot know more, so a
    score of 40 right out of 40 says nothing here about the 41st.
    Raises `ValueError` if the samples are empty or not finite, or if ``level`` or ``n_boot`` make no sense.
    """
    return _bootstrap(_checked(samples, "samples"), np.mean, level=level, n_boot=n_boot, seed=seed)


def wilson_interval(hits: int, n: int) -> Estimate:
    """Share of ``hits`` out of ``n`` with its 95 % Wilson score interval, which is sound at 0 and at ``n`` too.

    Raises `ValueError` unless ``0 <= hits <= n`` and ``n >= 1``.
    """
    if not 0 <= hits <= n or n < 1:
        raise TersorError(f"hits={hits} must be between 0 and n={n}, and n at least 1")
    z, share = 1.959964, hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)), "95% Wilson")


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean with its interval by Student's t; one value has none to either side."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, mean, mean, "95% t-interval")
    freedom = len(values) - 1
    # Beyond the table, the first term of its expansion in 1 / freedom.
    half = _STUDENT.get(freedom, 1.96 + 2.37 / freedom) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half, "95% t-interval")


def bootstrap_difference(
    a: Sequence[float] | _Floats,
    b: Sequence[float] | _Floats,
    *,
    level: float = 0.95,
    n_boot: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Mean of ``a - b`` with its interval, where ``a[i]`` and ``b[i]`` are scores of the same case.

    Pairs are resampled together, so the difficulty of a case cancels.
    Raises `ValueError` as `bootstrap_interval` does, and if the lengths differ.
    """
    left, right = _checked(a, "a"), _checked(b, "b")
    if left.shape != right.shape:
        raise TersorError(f"paired samples need equal lengths; got {left.size} and {right.size}")
    return _bootstrap(left - right, np.mean, level=level, n_boot=n_boot, seed=seed)


def seed_of(seed: int, index: int) -> int:
    """The seed of step ``index`` of a run with ``seed``: runs whose seeds are neighbours share no draws."""
    return seed * 1_000_003 + index


def machine() -> dict[str, str | int | None]:
    """What figures depend on: processor, cores this process may use, threads, system, GPU; no host name."""
    return {
        "cpu": _cpu_model(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "os": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Versions of Python, of tersor and of the libraries that its figures depend on, as far as installed."""
    found = {"python": platform.python_version()}
    for name in ("tersor", "torch", "transformers", "numpy", "optimum-quanto", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _nothing_queued() -> None:
    """On a CPU a call has done its work when it returns."""


def _time_once(function: Callable[[], object], synchronize: Callable[[], object], clock: Callable[[], float]) -> float:
    synchronize()
    start = clock()
    result = function()
    synchronize()
    seconds = clock() - start
    del result  # freed outside the timed part
    return seconds


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _checked(samples: Sequence[float] | _Floats, name: str) -> _Floats:
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise TersorError(f"{name} must be a non-empty sequence of numbers; got shape {values.shape}")
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise TersorError(f"{name}[{bad}] is {values[bad]}; drop failed cases or count them as wrong")
    return values


def _bootstrap(
    values: _Floats,
    statistic: Callable[..., npt.NDArray[np.float64]],
    *,
    level: float,
    n_boot: int,
    seed: int,
) -> Estimate:
    if not 0 < level < 1 or n_boot < 1:
        raise TersorError(f"got level={level} and n_boot={n_boot}; level must be inside (0, 1) and n_boot >= 1")
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // values.size)
    resampled = [
        statistic(values[generator.integers(values.size, size=(min(rows, n_boot - done), values.size))], axis=1)
        for done in range(0, n_boot, rows)
    ]
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(resampled), [tail, 1 - tail])
    value = float(statistic(values))
    # Rounding may put the mean of equal numbers one ulp outside their own range.
    return Estimate(value, min(float(low), value), max(float(high), value), f"{level * 100:g}% bootstrap")


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux; a container may be allowed fewer than the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
