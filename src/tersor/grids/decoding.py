"""The one decoder of grids: it runs the steps of a schedule on a reader, which says how logits meet cells.

`tersor.grids.schedule` has the orders, and says what a new one is. There are two kinds of readers: ZipAR's
(`tersor.grids.zipar.decoding`) runs models of other packages, whose tokens may be fed again; `AppendingReader` runs
the models of this one, and each model adds its forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor.grids.sampling import Sampler, guide, prefix_mask
from tersor.grids.schedule import Schedule, Step


@dataclass(frozen=True)
class Ready:
    """A step as readers use it: its places on the device.

    Args:
        number: Of the pass, from 0, which is the prefix's.
        step: The same as numbers.
        fed: ``[tokens]``, see `Step`.
        sources: ``[tokens]``, see `Step`.
        targets: ``[cells]``, see `Step`.
    """

    number: int
    step: Step
    fed: Tensor
    sources: Tensor
    targets: Tensor

    @classmethod
    def of(cls, number: int, step: Step, device: torch.device) -> Ready:
        """Put a step on a device."""

        def on_device(places: Sequence[int]) -> Tensor:
            return torch.tensor(places, dtype=torch.long, device=device)

        return cls(number, step, on_device(step.fed), on_device(step.sources), on_device(step.targets))


@lru_cache(maxsize=16)
def ready_steps(schedule: Schedule, device: torch.device) -> tuple[Ready, ...]:
    """All steps of a schedule; made once, since every image has the same."""
    with torch.inference_mode(False):
        return tuple(Ready.of(number, step, device) for number, step in enumerate(schedule.steps()))


class Reader(Protocol):
    """How the logits of a model meet cells; `decode` calls both methods once a pass."""

    def logits(self, ready: Ready, ids: Tensor) -> Tensor:
        """Run the pass's one forward.

        Args:
            ready: What to feed, and which cells come out.
            ids: Tokens of the images ``[samples, places]``, decided as far as the passes before.

        Returns:
            ``[rows, cells, vocabulary]``; with guidance there are two rows a sample.
        """

    def choose(self, ready: Ready, logits: Tensor, ids: Tensor) -> Tensor:
        """Ids ``[samples, cells]`` by these logits."""


def decode(
    reader: Reader, steps: Iterable[Ready], ids: Tensor, before_pass: Callable[[Tensor], None] | None = None
) -> int:
    """Decode one batch of images.

    Args:
        reader: The model with its prefix and its way to draw.
        steps: Passes of a schedule, see `ready_steps`.
        ids: ``[samples, places]``; filled in.
        before_pass: Called before each forward with what is decided so far; it may raise to stop.

    Returns:
        The number of forward passes.
    """
    passes = 0
    # Passes are many and short: what autograd keeps of views and versions even without gradients would be a tenth.
    # `ids` is older than the mode: what is made in it could not be trained on.
    with torch.inference_mode():
        for ready in steps:
            passes += 1
            if before_pass is not None:
                before_pass(ids)
            logits = reader.logits(ready, ids)
            ids.index_copy_(1, ready.targets, reader.choose(ready, logits, ids))
    return passes


class AppendingReader:
    """A model of this package: each pass appends what it feeds to one cache, and sees all that is there.

    A subclass adds `forward`.

    Args:
        prefix: Embeddings ``[rows, tokens, width]``; with guidance the null conditions are the second half of the rows.
        valid: Bool ``[rows, tokens]``, False for padding.
        embed: Embeds ids of the image.
        cache: Takes what is fed, as the library's caches do.
        sampler: Draws.
        guidance: See `guide`.
        guided_cells: Guidance ends when more cells than this are decided; -1 is never.
    """

    def __init__(
        self,
        prefix: Tensor,
        valid: Tensor,
        embed: Callable[[Tensor], Tensor],
        cache: Any,
        sampler: Sampler,
        *,
        guidance: float = 1.0,
        guided_cells: int = -1,
    ) -> None:
        self.prefix, self.valid, self.embed, self.cache, self.sampler = prefix, valid, embed, cache, sampler
        self.guidance, self.guided_cells = guidance, guided_cells
        self.branches = 1 if guidance == 1 else 2
        self.samples, self.tokens = len(prefix) // self.branches, prefix.shape[1]
        self.padded = not bool(valid.all())

    def forward(self, ready: Ready, embeddings: Tensor, places: Tensor, seen: Tensor | None) -> Tensor:
        """The logits of the pass's cells.

        Args:
            ready: The pass.
            embeddings: What it feeds, ``[rows, tokens, width]``.
            places: ``[tokens]``, counted from the prefix's first token.
            seen: Bool ``[rows, 1, tokens or 1, keys]``; None if each token sees all that is there.

        Returns:
            Float32 ``[rows, cells, vocabulary]``.
        """
        raise NotImplementedError

    def fed(self, ready: Ready, ids: Tensor) -> Tensor:
        """Embeddings of what the pass feeds."""
        tokens = ids.index_select(1, ready.sources)
        return self.embed(tokens if self.branches == 1 else tokens.repeat(self.branches, 1))

    def logits(self, ready: Ready, ids: Tensor) -> Tensor:
        """See `Reader`."""
        if ready.number == 0:
            places = torch.arange(self.tokens, device=ids.device)
            return self.forward(ready, self.prefix, places, None if self.tokens == 1 else prefix_mask(self.valid))
        seen = None
        if self.padded:
            appended = self.cache.get_seq_length() - self.tokens + len(ready.step.fed)
            seen = F.pad(self.valid, (0, appended), value=True)[:, None, None]
        return self.forward(ready, self.fed(ready, ids), self.tokens + ready.fed, seen)

    def choose(self, ready: Ready, logits: Tensor, ids: Tensor) -> Tensor:
        """See `Reader`."""
        ends = self.guided_cells != -1 and self.cache.get_seq_length() - self.tokens > self.guided_cells
        scores = guide(logits, self.samples, 1.0 if ends else self.guidance)
        step = ready.step
        return self.sampler.draw(self.sampler.process(scores, step.cells, lambda index: ids[:, : step.targets[index]]))
