"""Operations that a decoding step dispatches, counted on a CPU: each is a launch on a GPU, or a view."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from tersor._compat import with_cache
from tersor.kv.recipe import Recipe

#: Operations whose result the host waits for.
READ_BACK = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item", "tolist")
#: Operations that launch nothing: views and room for results.
NO_LAUNCH = frozenset(
    (
        *("view", "_unsafe_view", "expand", "transpose", "slice", "unsqueeze", "select", "t", "permute", "squeeze"),
        *("as_strided", "detach", "alias", "unbind", "split", "diagonal", "lift_fresh", "split_with_sizes", "tolist"),
        *("_local_scalar_dense", "is_nonzero", "empty", "new_empty", "scalar_tensor"),
    )
)
LAYERS = 4


class Operations(TorchDispatchMode):
    """Counts what is dispatched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # New tensors are filled with NaN in these tests (see conftest.py), which no user's are.
        self.counts[function.overloadpacket.__name__] += function.overloadpacket.__name__ != "fill_"
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> Operations:
        # `tolist` waits for the device, too, but is not dispatched.
        self._tolist = torch.Tensor.tolist

        def tolist(tensor: torch.Tensor) -> Any:
            self.counts["tolist"] += 1
            return self._tolist(tensor)

        torch.Tensor.tolist = tolist  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.Tensor.tolist = self._tolist  # type: ignore[method-assign]

    @property
    def launches_a_layer(self) -> float:
        return sum(count for name, count in self.counts.items() if name not in NO_LAUNCH) / LAYERS

    @property
    def a_layer(self) -> float:
        return sum(self.counts.values()) / LAYERS

    @property
    def read_backs(self) -> int:
        return sum(self.counts[name] for name in READ_BACK)


def small_model(kind: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    model, config = (LlamaForCausalLM, LlamaConfig) if kind == "llama" else (Qwen2ForCausalLM, Qwen2Config)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return model(config(vocab_size=64, num_hidden_layers=LAYERS, **shape)).eval()


@torch.no_grad()
def decoding_steps(recipe: Recipe | None, steps: int, *, batch: int = 1, kind: str = "llama") -> list[Operations]:
    """What each step after a prompt of 64 tokens dispatches; a larger batch is padded on the left."""
    model = small_model(kind)
    mask = None if batch == 1 else (torch.arange(64) >= 7 * torch.arange(batch)[:, None]).long()
    counted = []
    with nullcontext() if recipe is None else recipe.on(model):
        cache = DynamicCache(config=model.config) if recipe is None else recipe.cache(model.config)
        tokens = torch.randint(0, 64, (batch, 64), generator=torch.Generator().manual_seed(0))
        for _ in range(steps + 1):
            options = {}
            if mask is not None:
                positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
                options = {"attention_mask": mask, "position_ids": positions}
            with Operations() as each:
                model(tokens, logits_to_keep=1, **with_cache(cache), **options)
            counted.append(each)
            tokens = tokens[:, -1:]
            mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
    return counted[1:]


@torch.no_grad()
def prefill(recipe: Recipe | None, tokens: int = 600, *, batch: int = 1, kind: str = "llama") -> Operations:
    """What a prompt dispatches, once its like has been read before; a larger batch is padded on the left."""
    model, options = small_model(kind), {}
    ids = torch.randint(0, 64, (batch, tokens), generator=torch.Generator().manual_seed(0))
    if batch > 1:
        mask = (torch.arange(tokens) >= 7 * torch.arange(batch)[:, None]).long()
        options = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    with nullcontext() if recipe is None else recipe.on(model):
        for _ in range(2):
            cache = DynamicCache(config=model.config) if recipe is None else recipe.cache(model.config)
            with Operations() as counted:
                model(ids, logits_to_keep=1, **with_cache(cache), **options)
    return counted
