"""Settings of RepAPQ and of the methods that it is compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from tersor._errors import TersorError

WEIGHT_INITS = ("output", "minmax", "percentile", "mse", "mae")
ACTIVATION_INITS = ("mse", "minmax", "percentile")
LOSSES = ("mae", "mse")
ROUNDINGS = ("nearest", "learned")


@dataclass(frozen=True, kw_only=True)
class RepAPQConfig:
    """How a model is quantized; the defaults are RepAPQ with 8 bits.

    Args:
        weight_bits: 2 to 8, or 16, which rounds next to nothing.
        activation_bits: The same of a layer's input.
        first_last_bits: Least bits of the first and the last layer, as is usual in the literature.
        weight_init: Where a weight's grid ends at first: by what reaches the ``"output"``, by the largest entry
            (``"minmax"``), by 99 % of them (``"percentile"``), or by the error of the weights themselves (``"mse"``,
            ``"mae"``).
        activation_init: How an input's grid is found: by the error of the values (``"mse"``), by their whole range
            (``"minmax"``), or 99.9 % of it (``"percentile"``).
        init_images: Images that the first scales are found on.
        iterations: Training steps of each block; 0 leaves the first scales.
        loss: ``"mae"`` (the paper) or ``"mse"``, of a block's output.
        affine: Whether to train an affine a channel, which is folded away at the end.
        across_block: Whether to add the loss at the end of the stage, with the blocks between in floating point.
        stage_weight: Factor of that loss.
        train_weights: Whether to train weights, or only scales and affine.
        rounding: To the ``"nearest"`` integer, or ``"learned"``, up or down (AdaRound, arXiv 2004.10568), which leaves
            weights and their scales as they are.
        drop: Share of a layer's inputs that an iteration leaves unrounded (QDrop, arXiv 2203.05740).
        batch_size: Images of an iteration.
        weight_rate: Learning rate of weights; None is 1e-4 for 6 bits and more, else 1e-3.
        affine_rate: Learning rate of the affine.
        scale_rate: Learning rate of scales, as a share of the scale.
        symmetric: Whether an input's grid has zero in its middle, so that a file has int8 with zero points 0, as
            TensorRT takes them; half of it is unused after a ReLU.
        reduce_range: Whether weights have 7 bits at most, in 8: the sums of two products overflow on processors
            without VNNI otherwise.
        keep_float: Names of stages that stay in floating point. None: those of a chain most of whose layers have no
            integer kernel, because sums and gates read them, as in FastViT.
        ignored: Layers that stay in floating point: names, or patterns such as "stages.0.*".
        seed: Seed of the order of images.

    Raises:
        ValueError: If a setting is out of range.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    first_last_bits: int = 8
    symmetric: bool = False
    reduce_range: bool = False
    ignored: tuple[str, ...] = ()
    keep_float: tuple[str, ...] | None = None
    weight_init: str = "output"
    activation_init: str = "mse"
    init_images: int = 128
    iterations: int = 400
    loss: str = "mae"
    affine: bool = True
    across_block: bool = True
    stage_weight: float = 1.0
    train_weights: bool = True
    rounding: str = "nearest"
    drop: float = 0.0
    batch_size: int = 32
    weight_rate: float | None = None
    affine_rate: float = 1e-2
    scale_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "first_last_bits"):
            if (bits := getattr(self, name)) not in (2, 3, 4, 5, 6, 7, 8, 16):
                raise TersorError(f"{name}={bits} must be from 2 to 8, or 16")
        for name, allowed in (
            ("weight_init", WEIGHT_INITS), ("activation_init", ACTIVATION_INITS), ("loss", LOSSES),
            ("rounding", ROUNDINGS),
        ):  # fmt: skip
            if (value := getattr(self, name)) not in allowed:
                raise TersorError(f"{name}={value!r} must be one of {allowed}")
        if not 0 <= self.drop < 1:
            raise TersorError(f"drop={self.drop} must be from 0 to less than 1")
        if self.iterations < 0 or min(self.init_images, self.batch_size) < 1:
            raise TersorError(
                f"iterations={self.iterations} must not be negative, init_images={self.init_images} and "
                f"batch_size={self.batch_size} at least 1"
            )
        rates = (self.affine_rate, self.scale_rate, self.stage_weight, self.weight_rate or 0.0)
        if min(rates) < 0:
            raise TersorError("stage_weight and the learning rates must not be negative")

    @classmethod
    def of(cls, bits: str, **settings: object) -> Self:
        """From "w8a8", "w6a6", "w4a8", "w4a4" and the like."""
        parts = bits.lower().removeprefix("w").split("a")
        if not bits.lower().startswith("w") or len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise TersorError(f"bits {bits!r} must be such as 'w8a8': bits of weights, then of activations")
        return cls(weight_bits=int(parts[0]), activation_bits=int(parts[1]), **settings)  # type: ignore[arg-type]

    def without_training(self, weight_init: str) -> Self:
        """The same bits with scales that were only searched for, as plain quantizers have them.

        Plain ranges and percentiles are those of the activations too.
        """
        activation_init = weight_init if weight_init in ("minmax", "percentile") else "mse"
        return replace(self, weight_init=weight_init, activation_init=activation_init, iterations=0)

    def rate_of_weights(self, bits: int) -> float:
        """Learning rate of the weights of a layer with so many bits: the next integer is farther away with few."""
        if self.weight_rate is not None:
            return self.weight_rate
        return 1e-3 if bits < 6 else 1e-4
