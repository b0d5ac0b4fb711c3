"""The adapters of a judge: on the language model alone, whose pictures stay as they are seen."""

from __future__ import annotations

from typing import Any

from tersor._errors import TersorError
from tersor._lazy import installed, require

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


def load_base(location: str, *, four_bits: bool = False) -> Any:
    """The model that adapters are trained on, in bfloat16 on a GPU.

    Args:
        location: A folder or a name of the hub.
        four_bits: Keep its frozen weights in 4 bits (QLoRA, arXiv 2305.14314); what sees stays as it is.

    Raises:
        TersorError: If it cannot be loaded, or four bits are wanted where there is no GPU.
    """
    import torch
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    from tersor.zoo.inspection import load_checked

    if not four_bits:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        return load_checked(AutoModelForImageTextToText, location, dtype=dtype)
    if not torch.cuda.is_available():
        raise TersorError("--qlora needs a CUDA device; leave it out")
    if not installed("bitsandbytes"):
        raise TersorError("--qlora needs bitsandbytes: pip install bitsandbytes")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["visual", "lm_head"],
    )  # fmt: skip
    return AutoModelForImageTextToText.from_pretrained(location, quantization_config=settings, dtype=torch.bfloat16)
