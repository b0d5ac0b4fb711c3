"""A large key bias, taken out before keys are rounded and put back exactly into the scores.

Qwen2-class models add a bias to their keys that is hundreds of times larger than the signal in some layers. The cached
key of a token at position ``p`` is ``R_p (W x + b) = R_p W x + R_p b``, where ``R_p`` rotates: its second part sweeps a
channel up and down as ``p`` goes on, which no quantizer of a channel can follow. But it depends on the position alone,
so it need not be stored. What is left is quantized, and a query's score gets ``q . R_p b`` back, computed for all
positions by one matrix product with the table of cosines and sines that all layers share.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedConfig

from tersor._errors import TersorError, UnsupportedError
from tersor.kv.memo import remember, remembered

#: What positions remember: at which token of each sample position 0 is.
FIRST = "first places"
#: Positions that a table of cosines and sines grows by.
TABLE_STEP = 4096
#: Rotations whose angle of a position changes with the length of the text.
CHANGING = ("dynamic", "longrope")


class RotaryTable:
    """Cosines and sines of positions 0, 1, ... of one rotary embedding, float32 ``[positions, 2 * rotated dims]``."""

    def __init__(self, rotary: nn.Module):
        self.rotary = rotary
        self.waves = torch.empty(0, 0)

    def upto(self, length: int, device: torch.device) -> Tensor:
        """The first ``length`` positions or more, on ``device``: all cosines of a position, then all its sines."""
        if self.waves.shape[0] < length or self.waves.device != device:
            size = -(-length // TABLE_STEP) * TABLE_STEP
            places = torch.arange(size, device=device)[None]
            cos, sin = self.rotary(torch.empty(0, dtype=torch.float32, device=device), places)
            self.waves = torch.cat([cos[0], sin[0]], dim=-1)
        return self.waves


class KeyBias:
    """The rotated key bias of one attention layer.

    Args:
        bias: What the layer's key projection adds, ``[kv_heads, key_dim]``.
        table: Cosines and sines of the model's rotary embedding; it may turn only the first channels of a head.
    """

    def __init__(self, bias: Tensor, table: RotaryTable):
        self.bias = bias.detach().float()
        self.table = table
        #: At which token of each sample position 0 is, int64 ``[batch]``; None before the first update.
        self.first_place: Tensor | None = None
        # What is known of it without reading it back: whether it is 0 for all, and the last position of token 0.
        self._plain, self._ahead = True, 0
        self._weights: Tensor | None = None
        self._factor = 1.0

    @classmethod
    def of(cls, module: nn.Module) -> KeyBias:
        """That of a transformers attention module.

        Raises:
            ValueError: If the module adds no bias to its keys.
            NotImplementedError: If its keys are not simply rotated by one position a token.
        """
        name = type(module).__name__
        bias = getattr(getattr(module, "k_proj", None), "bias", None)
        if bias is None:
            raise TersorError(f"{name} adds no bias to its keys; leave subtract_key_bias off for this model")
        if getattr(module, "k_norm", None) is not None or getattr(module, "k_layernorm", None) is not None:
            raise UnsupportedError(f"{name} normalizes its keys after adding the bias, which mixes the two")
        table = _table(type(module), module.config)
        own = cls(bias.reshape(-1, module.head_dim), table)
        own._check(module)
        return own

    @classmethod
    def of_layer(cls, model: nn.Module, layer: int) -> KeyBias:
        """That of the attention module of a layer of ``model``; raises as `of` does."""
        own = (each for each in model.modules() if getattr(each, "layer_idx", None) == layer)
        return cls.of(next(each for each in own if hasattr(each, "k_proj")))

    @property
    def positions(self) -> tuple[Tensor | None, bool, int]:
        """What is known of positions: where each sample starts, whether at 0 for all, and the last one of token 0."""
        return self.first_place, self._plain, self._ahead

    @positions.setter
    def positions(self, known: tuple[Tensor | None, bool, int]) -> None:
        self.first_place, self._plain, self._ahead = known

    def note_positions(self, position_ids: Tensor | None, *, last: int, like: Tensor, layer: int) -> None:
        """Learn at which token each sample starts.

        Args:
            position_ids: Positions of an update, ``[batch or 1, new]``; None where they count from the first token.
            last: Index of the newest token.
            like: A tensor of the layer, for batch size and device.
            layer: Index of the layer, for the message.

        Raises:
            ValueError: If positions do not count up by one a token.
        """
        if position_ids is None:
            if self.first_place is not None and self._plain:
                return
            first = torch.zeros(len(like), dtype=torch.int64, device=like.device)
        else:
            first = _first_places(position_ids, last, len(like))
        if first is self.first_place:
            return
        if self.first_place is None:
            self._plain, self._ahead = not bool(first.any()), max(0, -int(first.min()))
        elif torch.equal(first, self.first_place):
            if position_ids is not None:  # so that the other layers of this forward need not compare
                remember(position_ids, FIRST, (last, len(like)), self.first_place)
            return
        else:
            raise TersorError(
                f"layer {layer}: position_ids must count up by one a token for subtract_key_bias; position 0 "
                f"was at token {self.first_place.tolist()} of the samples and is at {first.tolist()} now"
            )
        self.first_place = first

    def places(self, start: int, stop: int) -> Tensor:
        """Positions that tokens ``start:stop`` were rotated by, int64 ``[batch, tokens]``; 0 for padding."""
        assert self.first_place is not None  # set before anything is compressed
        tokens = torch.arange(start, stop, device=self.first_place.device)
        return (tokens - self.first_place[:, None]).clamp_min(0)

    def map_positions(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply an operation on the batch, or a move, to where the samples start."""
        self.first_place = None if self.first_place is None else function(self.first_place)

    def of_tokens(self, start: int, stop: int) -> Tensor:
        """What tokens ``start:stop`` of the sequence got: ``[batch, kv_heads, tokens, key_dim]``."""
        return self.keys(self.places(start, stop), stop + self._ahead)

    def keys(self, positions: Tensor, limit: int) -> Tensor:
        """``R_p b`` at ``positions`` ``[batch, tokens]`` below ``limit``: ``[batch, kv_heads, tokens, key_dim]``."""
        waves = self.table.upto(limit, positions.device)
        cos, sin = waves[positions][:, None].chunk(2, dim=-1)
        turned, rest = self._parts(positions.device)
        rotated = turned[:, None] * cos + _rotate_half(turned)[:, None] * sin
        return torch.cat([rotated, rest[:, None].expand(*rotated.shape[:-1], -1)], dim=-1)

    def scores(self, query: Tensor, tokens: int, scaling: float) -> Tensor:
        """``scaling * q . R_p b`` for the sequence's first ``tokens``: ``[batch, heads, queries, tokens]`` float32.

        Args:
            query: ``[batch, heads, queries, key_dim]``.
            tokens: Tokens from the start of the sequence, padding included, for which the value means nothing.
            scaling: Factor of the scores.
        """
        assert self.first_place is not None  # set before anything is compressed
        batch, heads, queries, dim = query.shape
        length = tokens + self._ahead
        waves = self.table.upto(length, query.device)[:length]
        weights = self._scaled(scaling, query.device)
        size = weights.shape[-1]
        asked = query.float().reshape(batch, len(weights), -1, 1, dim)
        front = asked if size == dim else asked[..., :size]
        scores = linear((front * weights).reshape(-1, 2 * size), waves)
        if size < dim:
            rest = self._parts(query.device)[1] * scaling
            scores = scores + (asked[..., size:] * rest[:, None, None]).sum(-1).reshape(-1, 1)
        scores = scores.reshape(batch, heads, queries, length)
        if self._plain:  # a token's place is its position
            return scores
        index = self.places(0, tokens)[:, None, None, :].expand(batch, heads, queries, -1)
        return scores.gather(-1, index)

    def _scaled(self, scaling: float, device: torch.device) -> Tensor:
        """What a query meets of cosines and of sines, ``[kv_heads, 1, 2, rotated dims]``; made once."""
        if self._weights is None or self._weights.device != device or self._factor != scaling:
            turned, _ = self._parts(device)
            self._weights = torch.stack([turned, _rotate_half(turned)], dim=1)[:, None] * scaling
            self._factor = scaling
        return self._weights

    def _parts(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The channels that are rotated and those that are not, ``[kv_heads, ...]``."""
        self.bias = self.bias.to(device)
        size = self.table.waves.shape[-1] // 2
        return self.bias[:, :size], self.bias[:, size:]

    def _check(self, module: nn.Module) -> None:
        """Compare with the model's own rotation once, so that another convention is refused and not miscounted."""
        turn = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
        positions = torch.arange(5, device=self.bias.device)[None]
        mine = self.keys(positions, 5)
        cos, sin = self.table.upto(5, self.bias.device)[positions].chunk(2, dim=-1)
        size = cos.shape[-1]
        raw = self.bias[None, :, None].expand(1, -1, 5, -1)
        theirs = None if turn is None else turn(raw[..., :size], raw[..., :size], cos, sin)[1]
        if theirs is None or not torch.allclose(mine[..., :size], theirs, rtol=1e-4, atol=1e-4):
            raise UnsupportedError(
                f"{type(module).__name__} rotates its keys in another way than subtract_key_bias knows; leave it off"
            )


def _first_places(position_ids: Tensor, last: int, batch: int) -> Tensor:
    """At which token of each sample position 0 is."""
    return remembered(
        position_ids,
        FIRST,
        (last, batch),
        lambda: (last - position_ids[:, -1]).to(torch.int64).expand(batch).clone(),
    )


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


#: Rotary embedding and its settings -> its table, so that all layers of a model share one.
_TABLES: dict[tuple[type, str], RotaryTable] = {}


def _table(attention: type[nn.Module], config: PreTrainedConfig) -> RotaryTable:
    """The table of a model's layers; the rotary embedding's class stands beside that of the attention."""
    name = attention.__name__.removesuffix("Attention") + "RotaryEmbedding"
    rotary: Any = getattr(sys.modules[attention.__module__], name, None)
    parameters = getattr(config, "rope_parameters", None) or {}
    if rotary is None or "mrope_section" in parameters or parameters.get("rope_type", "default") in CHANGING:
        raise UnsupportedError(
            f"{attention.__name__} does not rotate by one fixed angle a position; leave subtract_key_bias off"
        )
    key = rotary, f"{config.head_dim if hasattr(config, 'head_dim') else config.hidden_size} {parameters}"
    if key not in _TABLES:
        _TABLES[key] = RotaryTable(rotary(config))
    return _TABLES[key]
