"""Settings of a judge's training: trl's, and the few of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from trl import SFTConfig

from tersor._compat import name_checkpointing
from tersor._errors import TersorError


@dataclass
class IntJudgeConfig(SFTConfig):
    """`trl.SFTConfig` with defaults for judges (OpenING, arXiv 2411.18499, says nothing of them).

    Args:
        rank_weight: Of the ranking loss ``softplus(-y s)``; see `tersor.opening.intjudge.losses`.
        swap_weight: Of the swap-consistency loss ``(s(A, B) + s(B, A))^2``.
        both_orders: Whether each pair is read in both orders, one behind the other.
        max_length: None; a cut would part pictures from their places in the text.

    Raises:
        TersorError: For settings that would train something else.
    """

    rank_weight: float = 0.0
    swap_weight: float = 0.0
    both_orders: bool = True
    max_length: int | None = None
    learning_rate: float = 1e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    num_train_epochs: float = 3.0
    remove_unused_columns: bool = False  # the losses read columns that trl does not know

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available() and getattr(self, "bf16", None) is None:
            self.bf16 = False  # trl's default would raise
            self.dataloader_pin_memory = False  # and the library's would warn
        name_checkpointing(self)
        super().__post_init__()
        for name in ("rank_weight", "swap_weight"):
            if not getattr(self, name) >= 0:
                raise TersorError(f"{name}={getattr(self, name)} must not be negative")
        if self.max_length is not None or self.packing:
            raise TersorError(
                "max_length and packing would part pictures from their places in the text; leave them out"
            )
        if self.both_orders and self.per_device_train_batch_size % 2:
            raise TersorError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} must be even: the two orders of a "
                "pair are read together"
            )
        if self.swap_weight and not self.both_orders:
            raise TersorError("swap_weight compares the two orders of a pair; it needs both_orders=True")
