"""The cache of a decoding whose tokens may be fed again: which image token each slot holds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from tersor.grids.geometry import RasterGrid
from tersor.grids.sampling import additive, prefix_mask

#: An offset that no query reaches: padding.
_NEVER = sys.maxsize


def max_fed_tokens(grid: RasterGrid) -> int:
    """Image tokens that are ever fed: all but the last cell and the end of its row."""
    return grid.length - grid.end_of_row - 1


class Run(NamedTuple):
    """Slots next to each other, which most passes write; ``number`` of them from ``first`` on."""

    first: int
    number: int


def write(memory: Tensor, dim: int, slots: Run | Tensor, states: Tensor) -> None:
    """Copy ``states`` into some slots of ``memory`` along ``dim``; slots ``[rows, tokens]`` are each row's own."""
    if isinstance(slots, Run):
        memory.narrow(dim, *slots).copy_(states)
    elif slots.ndim == 2:
        rows = torch.arange(len(slots), device=memory.device)[:, None]
        memory.transpose(1, dim)[rows, slots.to(memory.device)] = states.transpose(1, dim)
    else:
        memory.index_copy_(dim, slots.to(memory.device), states)


class Slots:
    """Which image token each cache slot holds, in the order in which they are first fed, after the prefix.

    A fed token attends to the whole prefix, and to every slot whose offset is not above its own: decided tokens
    of rows above, and its own row up to itself. A token that is fed again, when what stood in for it is decided,
    takes the slot that it had: nothing stale is left, and nothing is moved.

    That is for images side by side, at the same places. `address_by_place` gives each image places of its own.

    Args:
        cache: Empty; its layers are replaced by `SlotLayer`.
        valid: Bool ``[rows, tokens]`` of the prefix, False for padding.
        most: How many tokens of the image there will be.
    """

    def __init__(self, cache: Cache, valid: Tensor, most: int) -> None:
        self.valid, self.capacity = valid, valid.shape[1] + most
        prefix = torch.where(valid, -1, _NEVER)
        # One row for all where no prefix is padded.
        self.offsets = F.pad(prefix[:1] if bool(valid.all()) else prefix, (0, most), value=_NEVER)[:, None]
        self.held = valid.shape[1]
        self.written: Run | Tensor = Run(0, self.held)
        self.slot_of: dict[int, int] = {}
        self.cache, self.branches, self.rows = cache, 0, list[int]()
        cache.layers = [SlotLayer(self) for _ in cache.layers]
        # A cache without a configuration makes its layers as they come.
        cache.layer_class_to_replicate = partial(SlotLayer, self)

    def prefix_mask(self, dtype: torch.dtype) -> Tensor:
        """Causal within the prefix, without padding: additive ``[rows, 1, tokens, tokens]``."""
        return additive(~prefix_mask(self.valid), dtype)

    def feed(self, offsets: Tensor, listed: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Take slots for the tokens of a pass; returns their additive mask ``[rows or 1, 1, queries, slots]``.

        Args:
            offsets: ``[queries]``, places of the tokens.
            listed: The same as numbers.
            dtype: Of the mask.
        """
        slots = [self.slot_of.setdefault(each, self.valid.shape[1] + len(self.slot_of)) for each in listed]
        self.held = self.valid.shape[1] + len(self.slot_of)
        run = slots == [*range(slots[0], slots[0] + len(slots))]
        self.written = Run(slots[0], len(slots)) if run else torch.tensor(slots, device=offsets.device)
        write(self.offsets, 2, self.written, offsets.expand(len(self.offsets), 1, -1))
        return additive(self.offsets.narrow(2, 0, self.held) > offsets.unsqueeze(1), dtype).unsqueeze(1)

    def address_by_place(self, branches: int) -> None:
        """From now on each image's tokens lie in the slots of their places; its rows lie side by side.

        Args:
            branches: Rows of an image, which come one after the other until now.
        """
        self.branches, self.rows = branches, [*range(len(self.valid) // branches)]
        self.slot_of = {place: self.valid.shape[1] + place for place in range(self.capacity - self.valid.shape[1])}
        for layer in self.cache.layers:
            layer.memory = tuple(
                each.view(branches, -1, *each.shape[1:]).transpose(0, 1).flatten(0, 1) for each in layer.memory
            )
            for each in layer.memory:
                # What a fast image has filled is hidden from a slow one, but computed.
                each.narrow(2, self.held, self.capacity - self.held).zero_()

    def feed_by_place(self, places: Tensor, images: Tensor, dtype: torch.dtype) -> Tensor:
        """As `feed`, with places of each row's own, ``[rows, queries]``; ``images`` are the rows' ``[images]``."""
        prefix = self.valid.shape[1]
        self.written = prefix + places
        self.held = prefix + int(places.max()) + 1
        hidden = torch.arange(self.held - prefix, device=places.device) > places[:, :, None]
        padding = ~self.valid.view(self.branches, -1, prefix)[:, images].transpose(0, 1).flatten(0, 1)
        padding = padding[:, None].expand(-1, places.shape[1], -1)
        return additive(torch.cat([padding, hidden], dim=-1), dtype).unsqueeze(1)

    def leave(self, position: int, number: int) -> None:
        """Have an image's rows change places with those of the last one of ``number`` that go on."""
        last = number - 1
        if position == last:
            return
        self.rows[position], self.rows[last] = self.rows[last], self.rows[position]
        for layer in self.cache.layers:
            for memory in layer.memory:
                one, other = (memory.narrow(0, each * self.branches, self.branches) for each in (position, last))
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)

    def fill(self, empty: Cache, cache: Cache, images: int) -> None:
        """Give a caller's cache what token by token would have left in it: tokens in the order of the image.

        Args:
            empty: The caller's.
            cache: The one of these slots.
            images: Its first rows, without those that guidance adds.
        """
        held = range(self.valid.shape[1])
        order = torch.tensor([*held, *(self.slot_of[each] for each in sorted(self.slot_of))], device=self.valid.device)
        for number, layer in enumerate(cache.layers):
            keys, values = (
                each[self._positions(images)].index_select(2, order.to(each.device)) for each in layer.memory
            )
            empty.update(keys, values, number)

    def _positions(self, images: int) -> list[int]:
        """Where the first row of each image lies."""
        if self.branches == 0:
            return [*range(images)]
        return [self.branches * self.rows.index(image) for image in range(images)]


class SlotLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer in memory that is taken once, written where `Slots` says."""

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots
        self.memory: tuple[Tensor, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.memory = tuple(
            each.new_empty(*each.shape[:2], self.slots.capacity, each.shape[3]) for each in (key_states, value_states)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.memory
        write(keys, 2, self.slots.written, key_states)
        write(values, 2, self.slots.written, value_states)
        if len(key_states) < len(keys):  # images that are complete feed nothing
            keys, values = keys.narrow(0, 0, len(key_states)), values.narrow(0, 0, len(key_states))
        self.keys, self.values = keys.narrow(2, 0, self.slots.held), values.narrow(2, 0, self.slots.held)
        return self.keys, self.values
