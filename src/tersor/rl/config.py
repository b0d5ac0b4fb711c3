"""Settings of a ZipR1 training: trl's, and the few of its own."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from trl import GRPOConfig

from tersor._compat import name_checkpointing
from tersor._errors import TersorError
from tersor.kv.zipvl import ZipVL
from tersor.rl.rewards import Gate

Objective = Literal["literal", "pathwise", "entropy"]


def paper_grid() -> list[float]:
    """The paper's thresholds: 0.94 to 0.975 in steps of 0.005."""
    return [round(0.94 + 0.005 * step, 3) for step in range(8)]


@dataclass
class ZipR1Config(GRPOConfig):
    """`trl.GRPOConfig` with the defaults of ZipR1 (arXiv 2504.18579).

    Settings of trl that the paper does not state keep trl's defaults; ``beta``, ``loss_type`` and
    ``use_bias_correction_kl`` are set to the paper's form of the loss.

    Args:
        thresholds: ZipVL's ``tau`` of the rollouts of a question, ascending; used again in turn for more of them.
        eval_threshold: ``tau`` of every rollout of `evaluate`, and of the model in use.
        objective: ``"pathwise"`` is the paper's objective with its complete gradient: the score function for the
            sampled answer, and the derivative of the token ratio. ``"literal"`` is the paper's estimator, in which the
            ratio is a part of the reward alone. ``"entropy"`` replaces the ratio's derivative by that of the
            attention's effective number of tokens, a proxy.
        efficiency_weight: Weight of the saved tokens against a right answer.
        gate: ``"group_any"`` counts what was saved where a rollout of the group is right, ``"none"`` always.
        correct_advantage: ``"nonneg"`` never pushes a right answer away. It reduces the variance of ``"literal"``,
            whose densest right answers lose against sparser ones, at the price of a bias; the others have no such
            advantages.
        zipvl: Settings of `ZipVL` for rollouts, training and use, without ``tau``.
        logprob_tolerance: Mean difference of log-probabilities between rollout and training above which the run is
            aborted; None is 1e-4 in float32, and 2e-2 in less.

    Raises:
        ValueError: For settings that would train something else.
    """

    thresholds: list[float] = field(default_factory=paper_grid)
    eval_threshold: float = 0.975
    objective: Objective = "pathwise"
    efficiency_weight: float = 1.0
    gate: Gate = "group_any"
    correct_advantage: Literal["signed", "nonneg"] = "signed"
    zipvl: dict[str, Any] = field(default_factory=dict)
    logprob_tolerance: float | None = None
    beta: float = 0.04
    loss_type: str = "grpo"
    use_bias_correction_kl: bool = False

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available() and getattr(self, "bf16", None) is None:
            self.bf16 = False  # trl's default would raise
            self.dataloader_pin_memory = False  # and the library's would warn
        name_checkpointing(self)
        super().__post_init__()
        self.recipe()
        for name, allowed in _WORDS.items():
            if getattr(self, name) not in allowed:
                raise TersorError(f"{name}={getattr(self, name)!r} must be one of {allowed}")
        grid = list(self.thresholds)
        if not grid or grid != sorted(grid) or not all(0.0 < tau <= 1.0 for tau in [*grid, self.eval_threshold]):
            raise TersorError(
                f"thresholds={grid} and eval_threshold={self.eval_threshold} must be shares above 0 and at most 1, the "
                "thresholds in ascending order"
            )
        if self.efficiency_weight < 0:
            raise TersorError(f"efficiency_weight={self.efficiency_weight} must not be negative")
        self._refuse()
        self._warn()

    def recipe(self) -> ZipVL:
        """The sparse attention of rollouts and training; the thresholds are those of the rows.

        Raises:
            ValueError: For settings that `ZipVL` refuses, or that generated tokens would be compressed by.
        """
        if "tau" in self.zipvl or self.zipvl.get("policy", "evict") == "quantize":
            raise TersorError(
                f"zipvl={self.zipvl} must leave out tau, which thresholds are for, and policy 'quantize', under which "
                "generated tokens are chosen from, too"
            )
        try:
            own: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in self.zipvl.items()
            }
            # Below 1, at which nothing is probed and no row could have a threshold of its own.
            return ZipVL(tau=min(self.eval_threshold, 0.999), **own)
        except TypeError:
            raise TersorError(f"zipvl={self.zipvl} has settings that ZipVL does not know") from None

    def _refuse(self) -> None:
        """What would train something else than what was asked for."""
        if self.use_vllm or self.use_transformers_continuous_batching:
            raise TersorError(
                "rollouts run through ZipVL, which vLLM and continuous batching do not; set use_vllm=False and "
                "use_transformers_continuous_batching=False"
            )
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise TersorError(
                f"multi_objective_aggregation={self.multi_objective_aggregation!r} would scale the token ratio to a "
                "variance of its own; use 'sum_then_normalize'"
            )
        if (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise TersorError(
                "gradient_checkpointing_kwargs={'use_reentrant': True} takes the gradient from the scores of "
                "attention; leave it out"
            )
        local = self.per_device_train_batch_size * (self.steps_per_generation or 1)
        if local % self.num_generations:
            raise TersorError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} times steps_per_generation="
                f"{self.steps_per_generation} must hold whole groups of num_generations={self.num_generations}, so "
                "that a question's rollouts are on one process"
            )

    def _warn(self) -> None:
        """What is allowed and rarely meant."""
        if self.num_generations % len(self.thresholds):
            warnings.warn(
                f"num_generations={self.num_generations} does not go through {len(self.thresholds)} thresholds evenly, "
                "so groups hold some more often than others",
                stacklevel=4,
            )
        if self.efficiency_weight > 1:
            warnings.warn(
                f"efficiency_weight={self.efficiency_weight}: a wrong answer that saves more can beat a right one",
                stacklevel=4,
            )
        if self.beta == 0:
            warnings.warn("beta=0: nothing holds the answers to those of the dense model", stacklevel=4)
        cut = {"top_p": self.top_p != 1.0, "top_k": bool(self.top_k), "min_p": bool(self.min_p)}
        if changed := [name for name, is_set in {**cut, "temperature": self.temperature != 1.0}.items() if is_set]:
            warnings.warn(
                f"{', '.join(changed)} cuts what is sampled, so that wrong answers are seen less often than the model "
                "gives them and right ones at high thresholds are pushed down; leave it out",
                stacklevel=4,
            )


_WORDS: dict[str, tuple[str, ...]] = {
    "objective": ("literal", "pathwise", "entropy"),
    "gate": ("group_any", "none"),
    "correct_advantage": ("signed", "nonneg"),
}
