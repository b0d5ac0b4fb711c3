"""A batch whose images are decoded each at its own pace: none waits for a slower one, and a complete one leaves."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tersor.grids.decoding import Ready, decode
from tersor.grids.raster.decoding import Decoded
from tersor.grids.sampling import Sampler
from tersor.grids.schedule import Step
from tersor.grids.speculative.config import SpeculativeConfig
from tersor.grids.speculative.decoding import SpeculativeDecoder
from tersor.grids.speculative.schedule import Window

#: Numbers of noise that are kept at most for cells which fast images have reached and slow ones have not.
_MOST_NOISE = 1 << 24


class OwnPaces(SpeculativeDecoder):
    """Decodes one batch in the mode "seed"; each image has a window of its own, at its own place of the grid.

    An image takes the passes that it takes alone. What comes out is what lock-step gives, since a cell's noise belongs
    to the cell.
    """

    @staticmethod
    def takes(config: SpeculativeConfig, sampler: Sampler, images: int, options: dict[str, Any]) -> bool:
        """Whether a batch can be decoded so: nothing may ask for cells of all images side by side.

        Args:
            config: Settings.
            sampler: Draws; its processors may read nothing but scores.
            images: Of the batch.
            options: See `RasterDecoder`.
        """
        alone = config.mode == "seed" and not config.first_drafts.startswith("law") and sampler.reads_scores_only
        return alone and images > 1 and not options.get("keep_scores") and options.get("guided_cells", -1) == -1

    def run(self) -> Decoded:
        """See `RasterDecoder`."""
        self.fed_in_all = 0
        first = self.window.advance(0)
        assert first is not None
        decode(self, [Ready.of(0, first, self.image.device)], self.image, self.before_pass)
        with torch.inference_mode():
            self._go_on()
        self.fed_tokens = round(self.fed_in_all / (self.branches * len(self.image)))
        return Decoded(self.image, (), len(self.cells_per_pass), self.row_start_pass)

    def _go_on(self) -> None:
        """All passes after the prefix's, which has decided one cell of each image."""
        images, cells, entered = len(self.image), self.window.cells, 1
        windows, decided, counts = [copy.copy(self.window) for _ in self.image], [1] * images, [1] * images
        kept = self.image.new_zeros(images, cells, dtype=torch.bool)
        rows = [*range(images)] if cells > 1 else []
        self.slots.address_by_place(self.branches)
        lead = max(self.window.size, _MOST_NOISE // (images * self.width))
        while rows:
            if self.before_pass is not None:
                self.before_pass(self.image)
            least, steps = min(decided), []
            for row in rows:
                windows[row].size = max(1, min(self.window.size, least + lead - decided[row]))
                step = windows[row].advance(counts[row])
                assert step is not None
                steps.append(step)
            tested = [windows[row].tested for row in rows]
            end = max(entered, *(each.stop for each in tested))
            self._enter(range(entered, end))
            entered = end
            self._first_drafts(rows, windows)
            same = self._test(rows, steps, [[cell - least for cell in each] for each in tested])
            agreed = same.cumprod(1).sum(1).tolist()
            for position in reversed(range(len(rows))):
                row, number = rows[position], min(agreed[position] + 1, len(tested[position]))
                kept[row, decided[row] : decided[row] + number] = same[position, :number]
                counts[row], decided[row] = number, decided[row] + number
                if decided[row] == cells:
                    self.slots.leave(position, len(rows))
                    rows[position] = rows[-1]
                    rows.pop()
            self._count(range(least, min(decided)))
        self.kept = [kept]

    def _count(self, cells: range) -> None:
        """Note the cells that are now decided in all images."""
        self.cells_per_pass.append(len(cells))
        self.draws.leave(len(cells))
        for cell in cells:
            if cell % self.grid.columns == 0:
                self.row_start_pass[cell // self.grid.columns] = len(self.cells_per_pass)

    def _first_drafts(self, rows: Sequence[int], windows: Sequence[Window]) -> None:
        """Give the cells that entered an image's window their first drafts."""
        new = [
            (row, self.window.place(cell), self.window.place(origin))
            for row in rows
            for cell, origin in zip(windows[row].new, windows[row].origins, strict=True)
        ]
        if not new:
            return
        images, places, origins = self._on_device(new).unbind(1)
        if self.first_drafts == "random":
            self.image[images, places] = self._ids(self.draws.random(1, len(new), self.width, self.image.device))[0]
        else:
            self.image[images, places] = self.image[images, origins]

    def _test(self, rows: Sequence[int], steps: Sequence[Step], cells: Sequence[Sequence[int]]) -> Tensor:
        """Run one pass, and draw each image's tested cells anew.

        Args:
            rows: Images that are not complete.
            steps: Of each.
            cells: Its tested cells, counted from the first one that is not decided everywhere.

        Returns:
            Bool ``[rows, cells]``, which of them hold what they held; shorter windows end with copies of
            their last cell.
        """
        images = self._on_device(rows)[:, None]
        fed, keep, targets, drawn = (
            self._on_device(_even(each))
            for each in ([s.fed for s in steps], [s.keep for s in steps], [s.targets for s in steps], cells)
        )
        scores = self._scores(images, fed, keep)
        if not bool(scores.amax(-1).isfinite().all()):
            for row, step in zip(scores, steps, strict=True):
                self.sampler.check(row[None, : len(step.cells)], step.cells)
        found = self.draws.draw_at(self.law(scores), images, drawn)
        drafts = self.image[images, targets]
        self.image[images, targets] = self._ids(found)
        return self._ids(found) == drafts

    def _scores(self, images: Tensor, fed: Tensor, keep: Tensor) -> Tensor:
        """Processed scores ``[rows, cells, vocabulary]`` of one forward.

        Args:
            images: ``[rows, 1]``.
            fed: Places of the tokens that go in, ``[rows, tokens]``.
            keep: Which of them logits are read from, ``[rows, cells]``.
        """
        branches, rows = self.branches, images[:, 0]
        embeddings = self.adapter.embed_image(self.image[images, fed].repeat_interleave(branches, 0))
        fed = fed.repeat_interleave(branches, 0)
        self.fed_in_all += fed.numel()
        starts = self.starts.unflatten(0, (branches, -1))[:, rows].transpose(0, 1).flatten(0, 1)
        mask = self.slots.feed_by_place(fed, rows, embeddings.dtype)
        logits = self.adapter.logits(embeddings, starts + fed, mask, self.cache, [*range(fed.shape[1])])
        logits = logits.unflatten(0, (-1, branches)).transpose(0, 1)
        logits = logits[:, torch.arange(len(rows), device=rows.device)[:, None], keep].flatten(0, 1)
        scores = self.restrict(logits.float(), len(rows))
        return self.sampler.process(scores, (), _no_ids, check=False)

    def _on_device(self, numbers: Any) -> Tensor:
        return torch.tensor(numbers, device=self.image.device)


def _even(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows of one length: shorter ones repeat their last number."""
    longest = max(map(len, rows))
    return [[*row, *[row[-1]] * (longest - len(row))] for row in rows]


def _no_ids(index: int) -> Tensor:
    raise AssertionError("processors read scores alone")
