"""Accuracy after quantization: RepAPQ, each part of it removed, and what users would pick instead, on one set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor._errors import TersorError
from tersor.bench.measure import Estimate, bootstrap_difference, bootstrap_interval
from tersor.bench.runs import Finished
from tersor.ptq.bench import peers as ptq_peers
from tersor.ptq.bench.data import Labelled
from tersor.ptq.calibration import quantize
from tersor.ptq.config import RepAPQConfig
from tersor.ptq.networks import RepNet

OURS, FLOAT = "RepAPQ", "floating point"
#: Images that a network computes at once.
_BATCH = 250


@dataclass(frozen=True)
class Method:
    """One way to quantize: RepAPQ's settings changed, or another library's quantizer, which has 8 bits alone."""

    name: str
    family: str
    settings: Callable[[RepAPQConfig], RepAPQConfig] | None = None
    peer: Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]] | None = None


def _block_reconstruction(base: RepAPQConfig, **settings: Any) -> RepAPQConfig:
    """Each block alone against its floating-point output, in squares, weights rounded up or down as learned."""
    return replace(
        base, weight_init="mse", rounding="learned", loss="mse", affine=False, across_block=False, **settings
    )


METHODS = (
    Method(OURS, "RepAPQ", lambda base: base),
    Method("RepAPQ with squares for MAE", "RepAPQ", lambda base: replace(base, loss="mse")),
    Method("RepAPQ without the affine", "ablation", lambda base: replace(base, affine=False)),
    Method("RepAPQ without across-block", "ablation", lambda base: replace(base, across_block=False)),
    Method("RepAPQ from the weights' range", "ablation", lambda base: replace(base, weight_init="minmax")),
    Method("its first scales alone", "ablation", lambda base: base.without_training("output")),
    Method("min-max", "plain", lambda base: base.without_training("minmax")),
    Method("percentile", "plain", lambda base: base.without_training("percentile")),
    Method("squared error of weights", "plain", lambda base: base.without_training("mse")),
    Method("AdaRound-like", "reconstruction", _block_reconstruction),
    Method("QDrop-like", "reconstruction", lambda base: _block_reconstruction(base, drop=0.5)),
    Method("ONNX Runtime", "library", peer=ptq_peers.onnx_runtime),
    Method("NNCF", "library", peer=ptq_peers.nncf),
)


@dataclass(frozen=True)
class Plan:
    """What is measured; part of what a resumed run compares."""

    model: str
    bits: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    images: int
    iterations: int
    held_out: int


@dataclass(frozen=True)
class Run:
    """One quantized network's answers.

    Args:
        right: By held-out image, 1 if its class is right.
        same: By held-out image, 1 if its class is the floating-point network's.
        divergence: Kullback-Leibler, floating point to quantized, mean in nats.
        seconds: Processor time of the calibration.
    """

    right: list[int]
    same: list[int]
    divergence: float
    seconds: float


@dataclass(frozen=True)
class Scores:
    """A method's runs over seeds. Intervals are over images, each with its mean over seeds."""

    runs: list[Run]

    def accuracy(self) -> Estimate:
        """Share of images that are classified right."""
        return bootstrap_interval(_mean([run.right for run in self.runs]), n_boot=2000)

    def against(self, other: Scores) -> Estimate:
        """Accuracy less another's, image by image."""
        return bootstrap_difference(
            _mean([run.right for run in self.runs]), _mean([run.right for run in other.runs]), n_boot=2000
        )

    def agreement(self) -> Estimate:
        """Share of images with the floating-point network's class."""
        return bootstrap_interval(_mean([run.same for run in self.runs]), n_boot=2000)

    def divergence(self) -> float:
        """Mean over seeds."""
        return sum(run.divergence for run in self.runs) / len(self.runs)

    def spread(self) -> float:
        """Largest less least accuracy of a seed."""
        means = [sum(run.right) / len(run.right) for run in self.runs]
        return max(means) - min(means)

    def seconds(self) -> float:
        """Mean over seeds."""
        return sum(run.seconds for run in self.runs) / len(self.runs)


def _mean(rows: Sequence[Sequence[int]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    mean: np.ndarray[Any, np.dtype[np.float64]] = np.asarray(rows, dtype=np.float64).mean(0)
    return mean


def pick(names: Sequence[str] | None) -> list[Method]:
    """The methods of these names, all of them for None.

    Raises:
        ValueError: If a name is unknown.
    """
    known = {method.name: method for method in METHODS}
    if unknown := [name for name in names or () if name not in known]:
        raise TersorError(f"--method {unknown[0]!r} is none of {sorted(known)}")
    return [known[name] for name in names or known]


@torch.no_grad()
def logits_of(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """``[n, classes]``, some images at a time."""
    return torch.cat([network(part) for part in torch.split(images, _BATCH)])


def compare(logits: Tensor, exact: Tensor, labels: Tensor, seconds: float = 0.0) -> Run:
    """A run from logits ``[n, classes]``, quantized and in floating point."""
    guesses = logits.argmax(1)
    divergence = F.kl_div(logits.log_softmax(1), exact.log_softmax(1), log_target=True, reduction="batchmean")
    return Run(
        (guesses == labels).int().tolist(), (guesses == exact.argmax(1)).int().tolist(), float(divergence), seconds
    )


def calibration_images(net: RepNet, data: Labelled, count: int, seed: int) -> Tensor:
    """``count`` images of ``data``, drawn by ``seed``, as the network takes them."""
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count]
    return net.normalize(data.pixels[rows])


def quantized_run(
    method: Method, net: RepNet, images: Tensor, config: RepAPQConfig, data: Labelled, exact: Tensor
) -> Run:
    """Calibrate on ``images`` and classify all of ``data``, whose logits in floating point are ``exact``."""
    start = time.process_time()
    if method.peer is not None:
        network = method.peer(net, images)
    else:
        assert method.settings is not None
        network = quantize(net, images, method.settings(config)).model
    seconds = time.process_time() - start
    return compare(logits_of(network, net.normalize(data.pixels)), exact, data.labels, seconds)


def run_plan(
    plan: Plan, net: RepNet, train: Labelled, held_out: Labelled, file: Path | None
) -> Iterator[tuple[str, str, Scores]]:
    """Bits, name and scores, method by method; ``file`` keeps finished runs, so that an interrupted plan goes on.

    Yields the floating-point network first. Methods that have 8 bits alone are left out elsewhere.
    """
    held = Labelled(held_out.pixels[: plan.held_out], held_out.labels[: plan.held_out])
    exact = logits_of(net, net.normalize(held.pixels))
    yield "", FLOAT, Scores([compare(exact, exact, held.labels)])
    # Methods, bits and seeds may be added to a run; what was measured with other images may not be mixed in.
    done = Finished(file, replace(plan, bits=(), methods=(), seeds=()), lambda kept: Run(**kept))

    def measure(bits: str, method: Method, seed: int) -> Run:
        config = RepAPQConfig.of(bits, iterations=plan.iterations, seed=seed)
        return quantized_run(method, net, calibration_images(net, train, plan.images, seed), config, held, exact)

    for bits in plan.bits:
        for method in pick(plan.methods):
            if method.peer is not None and bits != "w8a8":
                continue
            runs = [
                done.once(f"{bits}/{method.name}/{seed}", partial(measure, bits, method, seed)) for seed in plan.seeds
            ]
            yield bits, method.name, Scores(runs)
