"""The model that a ZipR1 training moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tersor.zoo.inspection import load_checked

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_policy(location: str, *, train_vision: bool = False, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A vision-language model to train, from where the reference will be read, too.

    Args:
        location: A folder or a name of the hub.
        train_vision: Whether the vision tower is trained; it changes no token count.
        dtype: Of the weights.

    Raises:
        ValueError: If it cannot be loaded; one line says why.
    """
    from transformers import AutoModelForImageTextToText

    policy: PreTrainedModel = load_checked(AutoModelForImageTextToText, location, dtype=dtype)
    if not train_vision:
        for name, weight in policy.named_parameters():
            weight.requires_grad_("visual" not in name and "vision" not in name)
    return policy
