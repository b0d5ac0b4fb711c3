"""One decoder layer's compressed cache: raw tokens wait in a buffer and become segments.

The walk of a key/value pair: `update` appends it raw and hands the buffer back, tagged with this layer; the
model passes it to the attention function, which computes the output, lets the selection score the waiting
tokens (`observe`) and so gives the layer the chance to compress them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tersor._errors import TersorError, UnsupportedError
from tersor.kv.engine.batch import BatchedLayer
from tersor.kv.engine.buffer import Buffer
from tersor.kv.engine.call import ATTENTION_NAME, EAGER_ATTENTION_NAME, AttentionCall
from tersor.kv.engine.choices import Choices
from tersor.kv.engine.tree import map_tensors
from tersor.kv.selection.base import Chosen
from tersor.kv.selection.probes import ProbeScores
from tersor.kv.storage.key_bias import KeyBias
from tersor.kv.storage.segments import Segment, TokenGroup
from tersor.lowbit.codes import AffineCodes
from tersor.lowbit.kernels import get_kernel
from tersor.lowbit.kernels.packed_attention import PartTable

TAG = "_tersor_layer"
#: What `CompressedLayer.state` has besides tokens.
PLAIN = ("dtype", "device", "seen", "record_past", "_since_crop", "attended", "param_dtype", "due")


class CompressedLayer(BatchedLayer):
    """Cache layer that compresses by a method's choices.

    ``buffer`` holds the newest tokens in model precision, ``segments`` everything older. A layer that compresses in
    another way overrides the methods under "stored tokens" below, and no others.

    Args:
        choices: How to compress.
        layer_idx: Index of the layer in the model.
    """

    #: The dataclasses that `state` may hold.
    NODES: tuple[type, ...] = (Buffer, ProbeScores, Chosen, Segment, TokenGroup, AffineCodes)

    def __init__(self, choices: Choices, layer_idx: int):
        self.choices = choices
        self.layer_idx = layer_idx
        #: Whether this layer warns, for all layers of its cache.
        self.speaks = True
        # The configuration of the model whose attention function met this layer's tag last.
        self._model_config: PreTrainedConfig | None = None
        self.reset()

    def reset(self) -> None:
        self.buffer = Buffer(self.layer_idx)
        self.is_initialized = False
        self.segments = []
        self.seen = 0
        #: Set by assisted decoding: compress only in `crop`.
        self.record_past = False
        # Tokens since the last `crop` of a recording; None before the first, which ends a prompt.
        self._since_crop: int | None = None
        #: Whether tersor's attention function has met this layer.
        self.attended = False
        self.key_bias: KeyBias | None = None
        #: Storage precision of parameters, found with the first segment.
        self.param_dtype: torch.dtype | None = None
        #: Set by a prompt or another long update until its tokens are compressed.
        self.due = False
        # Between `update` and its attention; what must not happen there is done after it.
        self._awaits_attention = False
        self._offload_later = False
        # Of a layer from a file, until a model takes it up: what its key bias knew of positions.
        self._loaded: tuple[Any, ...] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedLayer:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        # The configuration itself, since a copy would no longer tell which attention function the model uses.
        clone.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__getstate__().items()})
        clone._model_config = self._model_config
        return clone

    def __getstate__(self) -> dict[str, Any]:
        # A table of parts holds addresses of these very tensors.
        return {**self.__dict__, "_model_config": None, "_table": None}

    # -- the library's contract ------------------------------------------------------------------------------

    @property
    def keys(self) -> Any:
        """Keys of the waiting tokens, under the name that the library's layers use."""
        return self.buffer.keys

    @property
    def values(self) -> Any:
        """Values of the waiting tokens."""
        return self.buffer.values

    @property
    def scores(self) -> ProbeScores:
        """Attention that the waiting tokens got so far."""
        return self.buffer.scores

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[batch, kv_heads, new, head_dim]`` and return what the model's attention must read.

        With the attention function ``tersor`` in charge that is the tagged buffer, and the segments are read by
        the function itself; any other attention gets the whole dequantized sequence.

        Raises:
            RuntimeError: If the batch size changed without `batch_select_indices` or `batch_repeat_interleave`,
                or if tokens were evicted and another attention function asks for them.
        """
        if self._loaded is not None:
            raise RuntimeError("a loaded cache goes on inside `with method.on(model):`, which checks the weights")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.seen and key_states.shape[0] != self.keys.shape[0]:
            raise RuntimeError(
                f"layer {self.layer_idx} holds a batch of {self.keys.shape[0]} but got {key_states.shape[0]} rows; "
                "call batch_select_indices or batch_repeat_interleave first, or reset() to start over"
            )
        if self._awaits_attention:
            self._attention_passed_by()
        if self.buffer.is_inference and not torch.is_inference_mode_enabled():
            self.map_buffer(torch.clone)  # what was made in inference mode is written to in there only
        self.buffer.append(key_states, value_states, self.choices.window)
        if self.waiting == key_states.shape[2] and not self.segments:
            returned = key_states.view_as(key_states), value_states.view_as(value_states)  # with their gradient
        else:
            returned = self.keys, self.values
        self.seen += key_states.shape[2]
        self._awaits_attention = True
        if self._since_crop:
            # Drafts are followed by a crop; two updates without one are ordinary decoding again.
            self.record_past, self._since_crop = False, None
        elif self._since_crop is not None:
            self._since_crop = key_states.shape[2]
        if self.segments and not self.fused:
            if self._model_config is not None:
                self._check_readable()
            returned = self.dequantize()[:2]
        for each in returned:
            setattr(each, TAG, self)
        return returned

    def get_seq_length(self) -> int:
        return self.seen

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` leaves no trace: compressed tokens cannot be taken back without one."""
        return not self.choices.prefill.sparse and (self.record_past or not self.segments)

    def activate_past_recording(self) -> None:
        """Compress only in `crop` from now on, so that rejected draft tokens never reach a segment.

        Raises:
            NotImplementedError: With a sparse prefill, see `crop`.
        """
        self._check_croppable()
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest ``-tokens_to_remove`` tokens; 0 only ends a recording step.

        A crop that reaches into segments drops their tokens and keeps the parameters, which is lossy against a
        run that never saw them.

        Raises:
            NotImplementedError: With a sparse prefill: its tokens were chosen by the prompt as it was.
            ValueError: For a positive number.
        """
        self._check_croppable()
        if tokens_to_remove > 0:
            raise TersorError(
                f"crop({tokens_to_remove}) is not supported: pass the number of tokens to remove as a negative number"
            )
        if not self.is_initialized:
            return
        removed = min(-tokens_to_remove, self.seen)
        if removed:
            self.seen -= removed
            self.buffer.keep(0, max(self.waiting - removed, 0), self.choices.window)
            self.crop_segments(self.seen)
        if self.record_past:
            self._since_crop = 0
            self.compress_if_due()

    def offload(self) -> None:
        """Move to the CPU; between `update` and its attention that waits until the attention has been computed."""
        if self._awaits_attention and self.fused:
            self._offload_later = True
        elif self.is_initialized:
            self.move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self.move(self.device)

    def map_all(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.map_buffer(function)
            self.map_segments(function)

    def state(self) -> dict[str, Any]:
        """All that the layer knows, for a file: plain values, tensors, and dataclasses of `NODES`; empty before use."""
        if not self.is_initialized:
            return {}
        return {
            **{name: getattr(self, name) for name in PLAIN},
            "slots": self.buffer.held,
            "buffer": self.buffer.trimmed(),
            "segments": self.segments,
            "positions": () if self.key_bias is None else self.key_bias.positions,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the `state` of another layer of the same method."""
        if not state:
            return
        for name in PLAIN:
            setattr(self, name, state[name])
        self.buffer, self.segments, self.is_initialized = state["buffer"], state["segments"], True
        self.buffer.resize(state["slots"])
        self._loaded = state["positions"]

    def serve(self, model: PreTrainedModel) -> None:
        """Go on, after `restore`, for ``model``."""
        positions, self._loaded = self._loaded, None
        self._model_config = model.config.get_text_config(decoder=True)
        if positions:
            self.key_bias = KeyBias.of_layer(model, self.layer_idx)
            self.key_bias.positions = positions

    # -- reading ---------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Tokens in the buffer."""
        return len(self.buffer)

    @property
    def fused(self) -> bool:
        """Whether the attention function reads the segments itself, so that `update` need not dequantize."""
        names = (ATTENTION_NAME, EAGER_ATTENTION_NAME)
        return self._model_config is not None and self._model_config._attn_implementation in names

    @property
    def segments(self) -> list[Any]:
        """What is stored, in the order of the sequence; never changed in place."""
        return self._segments

    @segments.setter
    def segments(self, segments: list[Any]) -> None:
        self._segments = segments
        self._table: PartTable | None = None

    @property
    def parts(self) -> PartTable:
        """The segments as the attention kernel reads them."""
        if self._table is None:
            self._table = PartTable(part for segment in self.segments for part in segment.parts())
        return self._table

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Attention of a call whose mask all heads share over all that is stored; see `packed_attention`."""
        bias = None
        if self.key_bias is not None:
            bias = self.key_bias.scores(call.query, self.seen - self.waiting, call.scaling)
        kernel = get_kernel("packed_attention", device=call.query.device.type)
        output, lse = kernel(
            call.query, self.parts, self.buffer.window, scaling=call.scaling, mask=call.open, score_bias=bias
        )
        return output, lse

    def dequantize(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values ``[batch, kv_heads, sequence, head_dim]`` in token order and model precision.

        The third tensor, bool ``[batch, kv_heads, sequence]``, is False where nothing is stored (padding, evicted
        tokens); keys and values are zero there.
        """
        if self._loaded is not None and self.choices.storage.subtract_key_bias:
            raise TersorError("a loaded cache lacks the model's key bias; run the model with it first")
        batch, heads = self.keys.shape[:2]
        compressed = self.seen - self.waiting
        keys = self.keys.new_zeros(batch, heads, compressed + 1, self.keys.shape[-1])
        values = self.values.new_zeros(batch, heads, compressed + 1, self.values.shape[-1])
        present = torch.zeros(batch, heads, compressed + 1, dtype=torch.bool, device=keys.device)
        for segment in self.segments:
            segment.scatter_into(keys, values, present)
        if self.key_bias is not None:
            whole = keys[:, :, :compressed]
            bias = self.key_bias.of_tokens(0, compressed)
            whole += (bias * present[..., :compressed, None]).to(keys.dtype)
        return (
            torch.cat([keys[:, :, :compressed], self.keys], dim=2),
            torch.cat([values[:, :, :compressed], self.values], dim=2),
            torch.cat([present[..., :compressed], present.new_ones(batch, heads, self.waiting)], dim=2),
        )

    # -- scoring, and when to compress -----------------------------------------------------------------------

    def decide(self, chosen: tuple[Chosen, Chosen], sums: Tensor, counts: Tensor) -> None:
        """Store what attention used, without scoring it again; called by a sparse prefill before `observe`.

        Args:
            chosen: Important and regular tokens among the newest ones; all that wait before them are important.
            sums: Attention that the newest tokens got, as in `ProbeScores`.
            counts: Probe rows that see them.
        """
        self.buffer.decide(chosen, sums, counts)

    def observe(self, call: AttentionCall, lse: Tensor | None = None) -> None:
        """Score the waiting tokens and compress what is due; called by the attention function after the output.

        Args:
            call: The newest tokens' attention. Its module's configuration tells later updates who is in charge.
            lse: Log-sum-exp of each query's row, where the kernel gives one; without it, the buffer must be the
                whole sequence or the rows are normalized within the buffer.
        """
        self._model_config, self._awaits_attention, self.attended = call.module.config, False, True
        choices, buffer, segment = self.choices, self.buffer, len(self.segments)
        if choices.storage.subtract_key_bias:
            self.key_bias = self.key_bias or KeyBias.of(call.module)
            self.key_bias.note_positions(
                call.options.get("position_ids"), last=self.seen - 1, like=self.keys, layer=self.layer_idx
            )
        queries = call.query.shape[2]
        buffer.note_padding(call)
        prompt = not self.segments and self.waiting == queries and choices.fills_prompt(queries)
        long = prompt or choices.fills_gap(queries)
        self.due = self.due or long or buffer.decided is not None
        if buffer.decided is None and long:
            buffer.score_update(call, choices.selection, lse, segment)
        elif buffer.decided is None and choices.streaming_gap is not None:
            buffer.score_steps(call, choices.selection, lse, segment, choices.streaming_gap)
        if not self.record_past:
            self.compress_if_due()
        if self._offload_later:
            self._offload_later = False
            self.offload()

    def _attention_passed_by(self) -> None:
        """The last update never met the attention function: compress by key norms instead, and say so once."""
        self._awaits_attention, self._model_config = False, None
        self._check_readable()
        if self.speaks:
            warnings.warn(
                f"the model does not use the attention function {ATTENTION_NAME!r}, so tokens are ranked by key norm "
                "and every step dequantizes the cache; run it inside `with method.on(model):`",
                stacklevel=2,
            )
        if not self.record_past:
            self.due = self.due or (not self.segments and self.choices.fills_prompt(self.waiting))
            self.compress_if_due()

    def _check_croppable(self) -> None:
        if self.choices.prefill.sparse:
            raise UnsupportedError(
                f"layer {self.layer_idx} chose its tokens by the end of the prompt, so none can be taken back: "
                "assisted decoding, prompt lookup and crop do not go with a sparse prefill; run without them"
            )

    def _check_readable(self) -> None:
        """Raise `RuntimeError` where another attention function cannot read what is stored."""
        storage = self.choices.storage
        if storage.subtract_key_bias or storage.evicts:
            does, can = ("evicts tokens", "leave out") if storage.evicts else ("subtracts the key bias", "add back")
            raise RuntimeError(
                f"layer {self.layer_idx} {does}, which only the attention function {ATTENTION_NAME!r} can {can}; run "
                "the model inside `with method.on(model):`"
            )

    # -- stored tokens: what a layer that compresses in another way overrides --------------------------------

    def compress_if_due(self) -> None:
        """Compress the waiting tokens, but for the most recent ones, if there are enough or an update asked for it."""
        ready = self.waiting - self.choices.recent_fp_tokens
        started = bool(self.segments) or self.choices.starts_at(self.seen)
        if ready > 0 and started and (self.due or self.choices.fills_gap(ready)):
            self.due = False
            self.compress(ready)

    @torch.no_grad()
    def compress(self, tokens: int) -> None:
        """Turn the ``tokens`` oldest waiting tokens into a segment and free their raw form."""
        start, buffer = self.seen - self.waiting, self.buffer
        keys, values = self.keys[:, :, :tokens], self.values[:, :, :tokens]
        if self.key_bias is not None:
            keys = (keys.float() - self.key_bias.of_tokens(start, start + tokens)).to(keys.dtype)
        chosen = buffer.decided
        if chosen is None or tokens != self.waiting:
            waiting = buffer.oldest(tokens, len(self.segments))
            waiting.keys = keys
            chosen = self.choices.selection.choose(waiting)
        where = f"layer {self.layer_idx}"
        self.param_dtype = self.param_dtype or self.choices.storage.precision(keys, values)
        segment = self.choices.storage.encode(
            keys, values, chosen, start=start, where=where, param_dtype=self.param_dtype
        )
        self.segments = [*self.segments, segment]
        buffer.keep(tokens, self.waiting, self.choices.window)

    def crop_segments(self, limit: int) -> None:
        """Drop what is stored of tokens from position ``limit`` on."""
        self.segments = [part for part in (segment.before(limit) for segment in self.segments) if part is not None]

    def map_buffer(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function`` to the tensors of the waiting tokens."""
        self.buffer = map_tensors(self.buffer, function)
        if self.key_bias is not None:
            self.key_bias.map_positions(function)

    def map_segments(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function`` to the tensors of the segments."""
        self.segments = map_tensors(self.segments, function)

    def move(self, device: torch.device | str) -> None:
        """Move everything to ``device``."""
        self.map_all(lambda x: x.to(device, non_blocking=True))

    def owned(self) -> dict[str, Any]:
        """Everything that holds tensors, by name: buffer, padding, segments, scores, where samples start."""
        return {
            "keys": self.keys,
            "values": self.values,
            "valid": self.buffer.valid,
            "segments": self.segments,
            "scores": self.buffer.scores,
            "first_place": None if self.key_bias is None else self.key_bias.first_place,
        }

    def summary(self) -> dict[str, Any] | None:
        """Figures of this layer alone for `CompressedCache.summary`; None where the cache's own say it all."""
        return None
