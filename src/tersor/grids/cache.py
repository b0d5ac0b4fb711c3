"""The cache of models of this package, whose tokens are appended."""

from __future__ import annotations

from torch import Tensor


class FrontCache:
    """Keys and values of one decoding in the order in which they are fed, in memory that is taken once.

    A cache that grows would be copied in every pass, which in large batches takes as long as the products. In small
    ones each operation takes as long as another, so a pass's views are made for all layers at once.

    Args:
        slots: Tokens that there will be, prefix and cells.
        layers: Layers of the model.
    """

    def __init__(self, slots: int, layers: int) -> None:
        self.slots, self.layers, self.used = slots, layers, 0
        self.memory: Tensor | None = None
        # Keys and values of each layer in turns: where this pass's go, and all that there is.
        self.written: tuple[Tensor, ...] = ()
        self.kept: tuple[Tensor, ...] = ()

    def get_seq_length(self) -> int:
        """Tokens that are there."""
        return self.used

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append ``[rows, heads, tokens, head_dim]`` and return all that there is, as the library's caches do.

        A pass goes through the layers from 0 on.
        """
        if layer == 0:
            self._begin(keys)
        self.written[2 * layer].copy_(keys)
        self.written[2 * layer + 1].copy_(values)
        return self.kept[2 * layer], self.kept[2 * layer + 1]

    def _begin(self, keys: Tensor) -> None:
        """Make the views of a pass that feeds as many tokens as ``keys`` has."""
        rows, heads, tokens, width = keys.shape
        if self.memory is None:
            self.memory = keys.new_empty(2 * self.layers, rows, heads, self.slots, width)
        self.written = self.memory.narrow(3, self.used, tokens).unbind()
        self.used += tokens
        self.kept = self.memory.narrow(3, 0, self.used).unbind()
