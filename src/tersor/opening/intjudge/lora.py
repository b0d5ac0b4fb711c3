"""The adapters of a judge: on the language model alone, whose pictures stay as they are seen."""

from __future__ import annotations

from typing import Any

from tersor._lazy import require

#: Parts that see.
VISION = r".*(visual|vision).*"


def adapters(rank: int, *, dropout: float = 0.05) -> Any:
    """peft's `LoraConfig` on every linear layer of the language model.

    Args:
        rank: Of the adapters; their scale is twice as large.
        dropout: In front of them.
    """
    peft: Any = require("peft", "rl")
    return peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules="all-linear", exclude_modules=VISION,
        task_type="CAUSAL_LM",
    )  # fmt: skip
