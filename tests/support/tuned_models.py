"""Fine-tuned copies of small random models, for the tests of `tersor.experts`."""

from __future__ import annotations

import copy
import hashlib

import torch
from torch import Tensor
from transformers import PreTrainedModel

#: Experts that several tests pack, load and ask.
NAMES = ("math", "code", "chat")
IDS = torch.randint(2, 190, (4, 24), generator=torch.Generator().manual_seed(3))


def tuned(base: PreTrainedModel, seed: int, *, only: str = "", size: float = 0.1) -> PreTrainedModel:
    """A copy whose parameters with ``only`` in their name differ by noise of ``size`` times their spread."""
    expert = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in expert.named_parameters():
            if only in name:
                spread = parameter.float().std().clamp_min(0.1)
                noise = torch.randn(parameter.shape, generator=generator) * spread * size
                parameter.copy_(parameter.float() + noise)
    return expert.eval()


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    return model(input_ids=ids, attention_mask=mask).logits


def weights_hash(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.dim() else b"")
    return digest.hexdigest()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
