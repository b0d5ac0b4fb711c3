"""Cache layers driven the way a model drives them: update, then attention."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tersor.kv.depth.guard import SimilarityGuard
from tersor.kv.depth.pairs import PairedLayer
from tersor.kv.engine.attention import tersor_attention
from tersor.kv.engine.call import AttentionCall, causal_rows
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.engine.state import STATE, ForwardState
from tersor.kv.method import KVMethod
from tersor.kv.minicache import MiniCache
from tersor.kv.recipe import Recipe
from tersor.kv.storage.segments import TokenGroup
from tersor.kv.zipvl import ZipVL

HEADS, KV_HEADS, DIM = 4, 2, 16
SMALL = {"streaming_gap": 10, "min_tokens_to_compress": 8}
PAIR_SMALL = {**SMALL, "max_relative_error": 2.0}
PAIR_RAW = {**PAIR_SMALL, "bits": 16, "param_dtype": "float32"}

#: Queries, keys and values ``[batch, heads, tokens, dim]`` of one layer.
Tensors = tuple[Tensor, ...]


class Attention(nn.Module):
    """What a model's attention module shows to the attention function."""

    def __init__(self, groups: int = HEADS // KV_HEADS) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="tersor")
        self.num_key_value_groups = groups
        self.is_causal, self.layer_idx = True, 0
        self.eval()


MODULE = Attention()


def stream(batch: int, tokens: int, seed: int = 0) -> Tensors:
    """Random queries, keys and values."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, HEADS, tokens, DIM), (batch, KV_HEADS, tokens, DIM), (batch, KV_HEADS, tokens, DIM)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def padding_mask(batch: int, tokens: int, pads: list[int]) -> Tensor:
    """Causal mask ``[batch, 1, tokens, tokens]`` with ``pads`` left-padded columns closed."""
    mask = causal_rows(tokens, tokens, torch.device("cpu"))[:, None].repeat(batch, 1, 1, 1)
    for sample, pad in enumerate(pads):
        mask[sample, ..., :pad] = False
    return mask


# -- one layer -----------------------------------------------------------------------------------------------------


def step(layer: CompressedLayer, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """One forward of one layer: update, then attention. Returns ``[batch, new, heads, dim]``."""
    new = query.shape[2]
    if mask is None and new > 1 and layer.get_seq_length():
        mask = causal_rows(new, layer.get_seq_length() + new, query.device)[:, None].expand(query.shape[0], 1, -1, -1)
    k, v = layer.update(keys, values)
    return tersor_attention(MODULE, query, k, v, mask)[0]


def feed(layer: CompressedLayer, tensors: Tensors, start: int, stop: int) -> list[Tensor]:
    """Decode tokens ``start:stop`` one at a time."""
    return [step(layer, *(x[:, :, i : i + 1] for x in tensors)) for i in range(start, stop)]


def filled(recipe: Recipe, tensors: Tensors, prompt: int, stop: int) -> CompressedLayer:
    """A layer that has read a prompt and decoded up to ``stop``."""
    layer = CompressedLayer(recipe.method(), 0)
    step(layer, *(x[:, :, :prompt] for x in tensors))
    feed(layer, tensors, prompt, stop)
    return layer


def group_rows(group: TokenGroup, sample: int) -> list[Tensor]:
    """Everything stored for one sample of a packed group, empty slots left out."""
    slots = slice(None) if group.valid is None else group.valid[sample, 0]
    rows = [group.keys.codes[sample][:, slots], group.keys.minimum[sample], group.keys.step[sample]]
    for stored in (group.values.codes, group.values.minimum, group.values.step):
        rows.append(stored[sample][:, slots])
    return rows


# -- a pair of merged layers ---------------------------------------------------------------------------------------

Stream = list[Tensors]


def pair_stream(batch: int, tokens: int, *, spread: float = 0.3, seed: int = 0) -> Stream:
    """Tensors of two similar layers of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> Tensor:
        return torch.randn(batch, heads, tokens, DIM, generator=generator)

    keys, values = draw(KV_HEADS), draw(KV_HEADS)
    return [
        (draw(HEADS), size * (keys + spread * draw(KV_HEADS)), size * (values + spread * draw(KV_HEADS)))
        for size in (1.0, 2.5)
    ]


def on(function: Callable[[Tensor], Tensor], tensors: Stream) -> Stream:
    """``function`` applied to every tensor."""
    return [tuple(function(x) for x in layer) for layer in tensors]


def new_pair(recipe: MiniCache) -> tuple[PairedLayer, PairedLayer]:
    """The empty layers 0 and 1."""
    depth = recipe.method().depth
    guard = SimilarityGuard([(0, 1)], depth.max_relative_error, depth.strict)
    return PairedLayer.pair(recipe.method(), depth.rule, 0, guard)


def pair_step(layers, tensors: Stream, mask: Tensor | None = None) -> list[Tensor]:
    """One forward through both layers."""
    return [step(layer, *own, mask) for layer, own in zip(layers, tensors, strict=True)]


def pair_feed(layers, tensors: Stream, start: int, stop: int) -> list[Tensor]:
    """Decode tokens ``start:stop`` one at a time."""
    parts = [on(lambda x, i=i: x[:, :, i : i + 1], tensors) for i in range(start, stop)]
    return [out for part in parts for out in pair_step(layers, part)]


def filled_pair(recipe: MiniCache, tensors: Stream, prompt: int, stop: int) -> tuple[PairedLayer, PairedLayer]:
    """Layers that have read a prompt and decoded up to ``stop``."""
    layers = new_pair(recipe)
    pair_step(layers, on(lambda x: x[:, :, :prompt], tensors))
    pair_feed(layers, tensors, prompt, stop)
    return layers


# -- a sparse prefill ----------------------------------------------------------------------------------------------

SPARSE_HEADS = 8
SCALE = DIM**-0.5
SPARSE_MODULE = Attention(SPARSE_HEADS // KV_HEADS)


def uneven(batch: int, tokens: int, seed: int = 0, sharpness: float = 2.0) -> Tensors:
    """Random queries, keys and values whose attention is uneven."""
    generator = torch.Generator().manual_seed(seed)
    query, keys, values = (
        torch.randn(batch, heads, tokens, DIM, generator=generator) for heads in (SPARSE_HEADS, KV_HEADS, KV_HEADS)
    )
    return sharpness * query, keys, values


def asked(qkv: Tensors, mask: Tensor | None = None, **others) -> AttentionCall:
    """The call for these tensors."""
    return AttentionCall(SPARSE_MODULE, *qkv, mask, SCALE, **others)


def prefill(
    recipe: ZipVL | KVMethod, qkv: Tensors, mask: Tensor | None = None
) -> tuple[Tensor, CompressedLayer, ForwardState]:
    """One prompt through one layer; returns the output ``[batch, tokens, heads, dim]``."""
    method = recipe if isinstance(recipe, KVMethod) else recipe.method()
    layer, state = CompressedLayer(method, 0), ForwardState(method, frozenset({0}))
    keys, values = layer.update(*qkv[1:])
    output, _ = tersor_attention(SPARSE_MODULE, qkv[0], keys, values, mask, scaling=SCALE, **{STATE: state})
    return output, layer, state


def decode(layer: CompressedLayer, qkv: Tensors, start: int, stop: int) -> list[Tensor]:
    """Decode tokens ``start:stop`` one at a time."""
    outputs = []
    for i in range(start, stop):
        query, keys, values = (x[:, :, i : i + 1] for x in qkv)
        outputs.append(tersor_attention(SPARSE_MODULE, query, *layer.update(keys, values), None, scaling=SCALE)[0])
    return outputs


def kept_rows(state: ForwardState) -> list[list[int]]:
    """Tokens that took part in layer 0, by row."""
    return [row.tolist() for row in state.records[0].kept.rows()]


def naive(qkv: Tensors, kept: list[int], queries: list[int], allowed: Tensor) -> Tensor:
    """Attention of ``queries`` to ``kept`` under the mask ``allowed`` ``[tokens, tokens]``, one number at a time."""
    query, keys, values = (x.double() for x in qkv)
    output = torch.zeros(query.shape[2], SPARSE_HEADS, DIM, dtype=torch.float64)
    for head in range(SPARSE_HEADS):
        group = head // (SPARSE_HEADS // KV_HEADS)
        for i in queries:
            seen = [j for j in kept if allowed[i, j]]
            if not seen:
                continue
            scores = torch.stack([(query[0, head, i] * keys[0, group, j]).sum() * SCALE for j in seen])
            output[i, head] = (scores.softmax(0)[:, None] * values[0, group, seen]).sum(0)
    return output
