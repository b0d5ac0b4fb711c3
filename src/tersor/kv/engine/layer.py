"""One decoder layer's compressed cache: raw tokens wait in a buffer and become segments.

The walk of a key/value pair: `update` appends it raw and hands the buffer back, tagged with this layer; the
model passes it to the attention function, which computes the output, lets the selection score the waiting
tokens (`observe`) and so gives the layer the chance to compress them.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from tersor.kv.engine.tree import map_tensors
from tersor.kv.selection.probes import ProbeScores, attention_rows, probe_scores
from tersor.kv.selection.ratio import Waiting
from tersor.kv.storage.key_bias import KeyBias
from tersor.kv.storage.segments import Chosen, Segment
from tersor.lowbit.kernels.packed_attention import Part, RawPart

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from tersor.kv.method import KVMethod

TAG = "_tersor_layer"
ATTENTION_NAME = "tersor"


class CompressedLayer(CacheLayerMixin):
    """Cache layer that compresses by the choices of a `KVMethod`.

    ``keys``/``values`` (the names of the library's layers) are the buffer of waiting tokens
    ``[batch, kv_heads, waiting, head_dim]`` in model precision; ``segments`` hold everything older.
    """

    is_compileable = False
    is_sliding = False
    keys: Any
    values: Any

    def __init__(self, method: KVMethod, layer_idx: int):
        super().__init__()
        self.method = method
        self.layer_idx = layer_idx
        self.record_past = False
        # The configuration of the model whose attention function met this layer's tag last.
        self._model_config: PreTrainedConfig | None = None
        self._clear()

    def _clear(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.segments: list[Segment] = []
        self.valid: Tensor | None = None
        self.scores = ProbeScores()
        self.seen = 0
        self.key_bias: KeyBias | None = None
        self.first_place: Tensor | None = None
        # What a sparse prefill chose among the waiting tokens; see `decide`.
        self.decided: list[Chosen] | None = None
        # Set by an update that must be compressed at once, e.g. a prompt.
        self._due = False
        self._awaits_attention = False
        self._offload_later = False

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedLayer:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        # A copied configuration would no longer tell which attention function the model uses.
        memo[id(self._model_config)] = self._model_config
        clone.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return clone

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model_config": None}

    # -- the library's contract ------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[batch, kv_heads, new, head_dim]`` and return what the model's attention must read.

        With the attention function ``tersor`` in charge that is the tagged buffer, and the segments are read by
        the function itself; any other attention gets the whole dequantized sequence.

        Raises:
            RuntimeError: if the batch size changed without `batch_select_indices` or `batch_repeat_interleave`,
                or if tokens were evicted and another attention function asks for them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.seen and key_states.shape[0] != self.keys.shape[0]:
            raise RuntimeError(
                f"layer {self.layer_idx} holds a batch of {self.keys.shape[0]} but got {key_states.shape[0]} rows; "
                "call batch_select_indices or batch_repeat_interleave first, or reset() to start over"
            )
        if self._awaits_attention:
            self._attention_passed_by()
        new = key_states.shape[2]
        if self.waiting == 0 and key_states.requires_grad and torch.is_grad_enabled() and not self.segments:
            returned = key_states.view_as(key_states), value_states.view_as(value_states)
            self.keys, self.values = key_states.detach(), value_states.detach()
        else:
            self.keys = torch.cat([self.keys, key_states.detach()], dim=2)
            self.values = torch.cat([self.values, value_states.detach()], dim=2)
            returned = self.keys.view_as(self.keys), self.values.view_as(self.values)
        self.seen += new
        self._awaits_attention = True
        if self.segments and not self.fused:
            if self._model_config is not None:
                self._refuse_evicted()
            returned = self.dequantize()[:2]
        setattr(returned[0], TAG, self)
        return returned

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._clear()

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` leaves no trace: compressed tokens cannot be taken back without one."""
        return not self.method.sparse and (self.record_past or not self.segments)

    def activate_past_recording(self) -> None:
        """Compress only in `crop` from now on, so that rejected draft tokens never reach a segment.

        Raises:
            NotImplementedError: with a sparse prefill, see `crop`.
        """
        self._refuse_drafts()
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest ``-tokens_to_remove`` tokens; 0 only ends a recording step.

        A crop that reaches into segments drops their tokens and keeps the parameters, which is lossy against a
        run that never saw them.

        Raises:
            NotImplementedError: with a sparse prefill: its tokens were chosen by the prompt as it was.
            ValueError: for a positive number.
        """
        self._refuse_drafts()
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}) is not supported: pass the number of tokens to remove as a negative number"
            )
        if not self.is_initialized:
            return
        removed = min(-tokens_to_remove, self.seen)
        if removed:
            self._drop_newest(removed)
        if self.record_past:
            self._compress_if_due(recording=False)

    def _drop_newest(self, removed: int) -> None:
        kept = max(self.waiting - removed, 0)
        self.seen -= removed
        self._keep_waiting(0, kept)
        self._crop_segments(self.seen)

    def _crop_segments(self, limit: int) -> None:
        self.segments = [part for part in (segment.before(limit) for segment in self.segments) if part is not None]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device), ...])

    def offload(self) -> None:
        """Move to the CPU; between `update` and its attention that waits until the attention has been computed."""
        if self._awaits_attention and self.fused:
            self._offload_later = True
        else:
            self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        self._map(lambda x: x.to(device, non_blocking=True))

    def _map(self, function: Any) -> None:
        """Apply ``function`` to every tensor that the layer owns."""
        if self.is_initialized:
            self._map_waiting(function)
            self._map_segments(function)

    def _map_waiting(self, function: Any) -> None:
        self.keys, self.values = function(self.keys), function(self.values)
        self.scores, self.decided = map_tensors(self.scores, function), map_tensors(self.decided, function)
        self.valid = None if self.valid is None else function(self.valid)
        self.first_place = None if self.first_place is None else function(self.first_place)

    def _map_segments(self, function: Any) -> None:
        self.segments = map_tensors(self.segments, function)

    @property
    def owned_fields(self) -> tuple[str, ...]:
        """Names of the attributes that hold tensors: buffer, padding, segments, probe scores, where samples start."""
        return ("keys", "values", "valid", "segments", "scores", "first_place")

    def owned(self) -> list[Any]:
        """Everything that holds tensors."""
        return [getattr(self, name) for name in self.owned_fields]

    # -- reading ---------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Tokens in the raw buffer."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def fused(self) -> bool:
        """Whether the attention function reads the segments itself, so that `update` need not dequantize."""
        return self._model_config is not None and self._model_config._attn_implementation == ATTENTION_NAME

    def parts(self, mask: Tensor | None, query: Tensor, *, scaling: float) -> list[Part]:
        """Segments and buffer as the attention kernel reads them for ``query`` ``[batch, heads, queries, key_dim]``.

        ``mask``: bool ``[batch, 1 or heads of one, queries, sequence]``, or None for plain causal attention.
        """
        queries = query.shape[2]
        bias = (
            None
            if self.key_bias is None
            else self.key_bias.scores(query * scaling, self.places(0, self.seen - self.waiting))
        )
        parts = [part for segment in self.segments for part in segment.parts(mask, bias)]
        window: Tensor | None
        if mask is not None:
            window = mask[..., self.seen - self.waiting :]
        elif queries > 1:
            window = causal_rows(queries, self.waiting, self.keys.device)[None]
        else:
            window = None if self.valid is None else self.valid[:, None, None]
        return [*parts, RawPart(self.keys, self.values, window)] if self.waiting else parts

    def dequantize(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values ``[batch, kv_heads, sequence, head_dim]`` in token order and model precision.

        The third tensor, bool ``[batch, kv_heads, sequence]``, is False where nothing is stored (padding, evicted
        tokens); keys and values are zero there.
        """
        batch, heads = self.keys.shape[:2]
        compressed = self.seen - self.waiting
        keys = self.keys.new_zeros(batch, heads, compressed + 1, self.keys.shape[-1])
        values = self.values.new_zeros(batch, heads, compressed + 1, self.values.shape[-1])
        present = torch.zeros(batch, heads, compressed + 1, dtype=torch.bool, device=keys.device)
        for segment in self.segments:
            segment.scatter_into(keys, values, present)
        if self.key_bias is not None:
            whole = keys[:, :, :compressed]
            bias = self.key_bias.keys(self.places(0, compressed))
            whole += (bias * present[..., :compressed, None]).to(keys.dtype)
        return (
            torch.cat([keys[:, :, :compressed], self.keys], dim=2),
            torch.cat([values[:, :, :compressed], self.values], dim=2),
            torch.cat([present[..., :compressed], present.new_ones(batch, heads, self.waiting)], dim=2),
        )

    # -- scoring and compressing -----------------------------------------------------------------------------

    def decide(self, chosen: tuple[Chosen, Chosen], sums: Tensor, counts: Tensor) -> None:
        """Called by a sparse prefill before `observe`: store what attention used, without scoring it again.

        ``chosen``: important and regular among the waiting tokens. ``sums``, ``counts``: as in `ProbeScores`.
        """
        self.scores.add_sums(sums, counts)
        self.decided = list(chosen)

    def observe(
        self,
        query: Tensor,
        mask: Tensor | None,
        module: nn.Module,
        *,
        scaling: float,
        lse: Tensor | None = None,
        softcap: float | None = None,
        position_ids: Tensor | None = None,
    ) -> None:
        """Called by the attention function after the output: score the waiting tokens, compress what is due.

        ``query``: ``[batch, heads, new, dim]`` of the newest tokens. ``mask``: bool over the whole sequence or None.
        ``module``: the model's attention layer; its ``config`` tells later updates that this function is in charge.
        ``lse``: log-sum-exp of each query's row, where the kernel gives one; without it, the buffer must be the
        whole sequence or the rows are normalized within the buffer.
        """
        self._model_config, self._awaits_attention = module.config, False
        if self.method.storage.subtract_key_bias:
            self._note_key_bias(module, position_ids)
        queries = query.shape[2]
        self._note_padding(mask, queries)
        prompt = not self.segments and self.waiting == queries and queries >= self.method.min_tokens_to_compress
        decided = self.decided is not None
        self._due = self._due or decided or prompt or queries >= self.method.streaming_gap
        if not decided:
            window = None if mask is None else mask[..., self.seen - self.waiting :].any(1)
            if prompt or queries >= self.method.streaming_gap:
                self._score_long_update(query, window, scaling, lse, softcap)
            else:
                self._score_steps(query, window, scaling, lse, softcap)
        self._compress_if_due(recording=self.record_past)
        if self._offload_later:
            self._offload_later = False
            self.offload()

    def _note_key_bias(self, module: nn.Module, position_ids: Tensor | None) -> None:
        """Learn the layer's key bias and at which position each sample starts; see `tersor.kv.storage.key_bias`."""
        if self.key_bias is None:
            self.key_bias = KeyBias.of(module)
        last = self.seen - 1
        first = torch.zeros(1, dtype=torch.int64, device=self.keys.device)
        if position_ids is not None:
            first = (last - position_ids[:, -1]).to(torch.int64)
        first = first.expand(self.keys.shape[0])
        if self.first_place is not None and not torch.equal(first, self.first_place):
            raise ValueError(
                f"layer {self.layer_idx}: position_ids must count up by one a token for subtract_key_bias; position 0 "
                f"was at token {self.first_place.tolist()} of the samples and is at {first.tolist()} now"
            )
        self.first_place = first.clone()

    def places(self, start: int, stop: int) -> Tensor:
        """Positions that tokens ``start:stop`` were rotated by, int64 ``[batch, tokens]``; 0 for padding."""
        assert self.first_place is not None  # set before anything is compressed
        tokens = torch.arange(start, stop, device=self.keys.device)
        return (tokens - self.first_place[:, None]).clamp_min(0)

    def _note_padding(self, mask: Tensor | None, queries: int) -> None:
        """A new token that no query may look at is padding."""
        if mask is None:
            seen = None if self.valid is None else self.valid.new_ones(self.keys.shape[0], queries)
        else:
            seen = mask[..., self.seen - queries :].any(1).any(1)
            if self.valid is None and bool(seen.all()):
                seen = None
        if seen is None:
            return
        if self.valid is None:
            self.valid = seen.new_ones(seen.shape[0], self.waiting - queries)
        self.valid = torch.cat([self.valid, seen], dim=1)

    def _score_long_update(
        self, query: Tensor, window: Tensor | None, scaling: float, lse: Tensor | None, softcap: float | None
    ) -> None:
        """Probe rows of a prompt or another long update."""
        selection = self.method.selection
        scores = probe_scores(
            query,
            self.keys,
            self.valid,
            window,
            lambda length: selection.probe_rows(length, layer=self.layer_idx, segment=len(self.segments)),
            per_head=selection.per_head,
            scaling=scaling,
            lse=lse,
            softcap=softcap,
        )
        if scores is not None:
            self.scores.add_sums(*scores)

    def _score_steps(
        self, query: Tensor, window: Tensor | None, scaling: float, lse: Tensor | None, softcap: float | None
    ) -> None:
        """Rows of single decoding steps (or a few draft tokens), restricted to the buffer."""
        selection, new = self.method.selection, query.shape[2]
        first = self.waiting - new
        steps = [
            step
            for step in range(new)
            if selection.probes_step(
                first + step, self.method.streaming_gap, layer=self.layer_idx, segment=len(self.segments)
            )
        ]
        if not steps:
            return
        allowed = causal_rows(new, self.waiting, query.device) if window is None else window
        rows = attention_rows(
            query[:, :, steps],
            self.keys,
            allowed[:, steps],
            scaling=scaling,
            lse=None if lse is None else lse[:, :, steps],
            softcap=softcap,
        )
        if not selection.per_head:
            rows = rows.mean(1, keepdim=True)
        self.scores.rows += [rows[:, :, i, : first + step + 1].clone() for i, step in enumerate(steps)]

    def _compress_if_due(self, *, recording: bool) -> None:
        ready = self.waiting - self.method.recent_fp_tokens
        if recording or ready <= 0 or not (self._due or ready >= self.method.streaming_gap):
            return
        self._due = False
        self._compress(ready)

    @torch.no_grad()
    def _compress(self, tokens: int) -> None:
        """Turn the ``tokens`` oldest waiting tokens into a segment and free their raw form."""
        start = self.seen - self.waiting
        keys, values = self.keys[:, :, :tokens], self.values[:, :, :tokens]
        if self.key_bias is not None:
            keys = (keys.float() - self.key_bias.keys(self.places(start, start + tokens))).to(keys.dtype)
        valid = None if self.valid is None else self.valid[:, :tokens]
        if self.decided is not None and tokens == self.waiting:
            important, regular = self.decided
        else:
            waiting = Waiting(keys, valid, self.scores.keep_columns(0, tokens), self.layer_idx, len(self.segments))
            important, regular = self.method.selection.choose(waiting)
        where = f"layer {self.layer_idx}"
        self.segments.append(self.method.storage.encode(keys, values, (important, regular), start=start, where=where))
        self._keep_waiting(tokens, self.waiting)

    def _keep_waiting(self, start: int, stop: int) -> None:
        """Keep the waiting tokens ``start:stop`` in storage of their own, with their scores."""
        self.keys, self.values = self.keys[:, :, start:stop].clone(), self.values[:, :, start:stop].clone()
        self.scores = self.scores.keep_columns(start, stop)
        self.decided = None
        if self.valid is not None:
            self.valid = self.valid[:, start:stop].clone()
            if bool(self.valid.all()):
                self.valid = None

    def _attention_passed_by(self) -> None:
        """The last update never met the attention function: compress by key norms instead, and say so once."""
        self._awaits_attention, self._model_config = False, None
        self._refuse_evicted()
        if self.layer_idx == 0:
            warnings.warn(
                f"the model does not use the attention function {ATTENTION_NAME!r}, so tokens are ranked by key norm "
                "and every step dequantizes the cache; run it inside `with method.on(model):`",
                stacklevel=2,
            )
        if not self.record_past:
            self._due = self._due or (not self.segments and self.waiting >= self.method.min_tokens_to_compress)
            self._compress_if_due(recording=False)

    def _refuse_drafts(self) -> None:
        if self.method.sparse:
            raise NotImplementedError(
                f"layer {self.layer_idx} chose its tokens by the end of the prompt, so none can be taken back: "
                "assisted decoding, prompt lookup and crop do not go with a sparse prefill; run without them"
            )

    def _refuse_evicted(self) -> None:
        if self.method.storage.subtract_key_bias:
            raise RuntimeError(
                f"layer {self.layer_idx} subtracts the key bias, which only the attention function {ATTENTION_NAME!r} "
                "can add back; run the model inside `with method.on(model):`"
            )
        if self.method.storage.evicts:
            raise RuntimeError(
                f"layer {self.layer_idx} evicts tokens, which only the attention function {ATTENTION_NAME!r} can leave "
                "out; run the model inside `with method.on(model):`"
            )


def boolean_mask(mask: Tensor) -> Tensor:
    """Where a query may look; an additive mask is open where it does not push scores to the bottom."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def causal_rows(queries: int, columns: int, device: torch.device) -> Tensor:
    """Plain causal attention of the last ``queries`` of ``columns`` tokens: bool ``[1, queries, columns]``."""
    row = torch.arange(columns - queries, columns, device=device)[:, None]
    return (torch.arange(columns, device=device) <= row)[None]
