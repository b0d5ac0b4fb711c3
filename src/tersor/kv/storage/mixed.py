"""Storage: in which form important and regular tokens are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from tersor._errors import TersorError
from tersor.kv.selection.base import Chosen
from tersor.kv.storage.segments import Segment, TokenGroup
from tersor.lowbit.codecs import channel_scale, encode_keys_channelwise, encode_values_channel_separable
from tersor.lowbit.codes import storage_dtype

ParamScope = Literal["token", "token_head"]


class Storage(Protocol):
    """What the engine asks of a storage; a frozen dataclass that holds no tensors."""

    @property
    def evicts(self) -> bool:
        """Whether tokens may be dropped, so that no dense cache can be rebuilt."""

    @property
    def param_dtype(self) -> str:
        """Name of the storage precision of parameters, e.g. "float16"."""

    @property
    def subtract_key_bias(self) -> bool:
        """Whether the layer takes the model's rotated key bias out of the keys first (`tersor.kv.storage.key_bias`)."""

    def encode(
        self,
        keys: Tensor,
        values: Tensor,
        chosen: tuple[Chosen, Chosen],
        *,
        start: int,
        where: str,
        param_dtype: torch.dtype | None = None,
    ) -> Segment:
        """Encode tokens ``[batch, kv_heads, tokens, head_dim]`` that begin at position ``start``.

        Args:
            keys: The tokens' keys.
            values: Their values.
            chosen: Important and regular tokens.
            start: Position of the first token.
            where: What is encoded, for messages.
            param_dtype: Storage precision of the parameters, as `precision` found it for this sequence; None to ask it.
        """

    def precision(self, *tokens: Tensor) -> torch.dtype:
        """The storage precision for a sequence that has such keys and values; read back from the device once."""


@dataclass(frozen=True, kw_only=True)
class MixedPrecisionStorage:
    """Important tokens in ``high_bits``, the others in ``low_bits`` (0 evicts, 16 keeps model precision).

    Keys are channelwise, values channel-separable tokenwise; see `tersor.lowbit.codecs`.

    Args:
        high_bits: Bits of important tokens.
        low_bits: Bits of the others.
        value_high_bits: A packed width of their own for the values of important tokens, or None.
        value_low_bits: Likewise for the others.
        value_param_scope: Value parameters per ``"token"``, or per ``"token_head"``.
        param_dtype: Name of the storage precision of minima, steps and scales.
        channel_scale_power: Exponent of the value channels' scale: 0.5 (paper), 1 (plain maximum), 0 (none).
        check_finite: Raise on NaN or infinity.
        subtract_key_bias: Keys come without the model's key bias, see `tersor.kv.storage.key_bias`.
    """

    high_bits: int = 4
    low_bits: int = 2
    value_high_bits: int | None = None
    value_low_bits: int | None = None
    value_param_scope: ParamScope = "token"
    param_dtype: str = "float16"
    channel_scale_power: float = 0.5
    check_finite: bool = False
    subtract_key_bias: bool = False

    @property
    def evicts(self) -> bool:
        return self.low_bits == 0

    def precision(self, *tokens: Tensor) -> torch.dtype:
        wanted: torch.dtype = getattr(torch, self.param_dtype)
        packs = any(bits not in (0, 16) for bits in (self.high_bits, self.low_bits))
        return storage_dtype(wanted, *tokens) if packs else wanted

    def encode(
        self,
        keys: Tensor,
        values: Tensor,
        chosen: tuple[Chosen, Chosen],
        *,
        start: int,
        where: str,
        param_dtype: torch.dtype | None = None,
    ) -> Segment:
        dtype = param_dtype or self.precision(keys, values)
        if self.check_finite:
            for name, tensor in (("keys", keys), ("values", values)):
                if not bool(torch.isfinite(tensor).all()):
                    raise TersorError(
                        f"{where}: {name} hold NaN or infinity; look for overflow in the model's precision"
                    )
        widths = (
            (self.high_bits, self.value_high_bits or self.high_bits),
            (self.low_bits, self.value_low_bits or self.low_bits),
        )
        kept = [
            (picked, bits) for picked, bits in zip(chosen, widths, strict=True) if bits[0] and picked.index.shape[-1]
        ]
        scale = self._channel_scale(values, [picked for picked, bits in kept if bits[0] != 16], dtype)
        groups = [self._group(keys, values, picked, bits, scale, start, dtype) for picked, bits in kept]
        return Segment(groups, scale, start, keys.shape[2])

    def _channel_scale(self, values: Tensor, packed: list[Chosen], dtype: torch.dtype) -> Tensor | None:
        """One scale for both packed groups of the segment, over every token that they hold."""
        if not packed:
            return None
        tokens = torch.cat([picked.gather(values) for picked in packed], dim=2)
        valid = None
        if any(picked.valid is not None for picked in packed):
            valid = torch.cat([picked.slots for picked in packed], dim=-1)
        return channel_scale(tokens, power=self.channel_scale_power, valid=valid, param_dtype=dtype)

    def _group(
        self,
        keys: Tensor,
        values: Tensor,
        picked: Chosen,
        bits: tuple[int, int],
        scale: Tensor | None,
        start: int,
        dtype: torch.dtype,
    ) -> TokenGroup:
        keys, values = picked.gather(keys), picked.gather(values)
        positions = (picked.index + start).to(torch.int32)
        key_bits, value_bits = bits
        if key_bits == 16:
            return TokenGroup(keys, values, positions, picked.valid)
        assert scale is not None
        return TokenGroup(
            encode_keys_channelwise(keys, key_bits, valid=picked.valid, param_dtype=dtype),
            encode_values_channel_separable(
                values,
                value_bits,
                scale,
                per_head=self.value_param_scope == "token_head",
                valid=picked.valid,
                param_dtype=dtype,
            ),
            positions,
            picked.valid,
        )
