"""A PEFT adapter as an expert: merged into the base before it is packed."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from tersor._errors import TersorError
from tersor._lazy import require
from tersor.experts.sources import load_model, local_folder
from tersor.zoo.inspection import refused

ADAPTER = "adapter_config.json"


def merged_adapter(base: Any, expert: Any) -> Any:
    """``expert`` itself, or where it is the folder of an adapter (LoRA and the like) the base with the adapter merged.

    Args:
        base: A model, or a folder or hub name.
        expert: The same, or an adapter's folder or hub name.

    Raises:
        TersorError: If the adapter does not fit the base.
        MissingExtraError: If PEFT is not installed.
    """
    if isinstance(expert, nn.Module) or not (local_folder(expert) / ADAPTER).is_file():
        return expert
    folder = local_folder(expert)
    if not (folder / "adapter_model.safetensors").is_file():
        raise TersorError(f"{folder} has no adapter_model.safetensors; save it anew (pickled ones are not loaded)")
    peft = require("peft", "rl")
    model = copy.deepcopy(base) if isinstance(base, nn.Module) else load_model(base)
    with refused(f"the PEFT adapter {folder}"):
        merged = peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)
    merged.name_or_path = str(folder)
    return merged.eval()
