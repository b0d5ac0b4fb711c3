"""From logits to ids: the mask of a prefix, guidance, and the draw, for all decoders of grids."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from transformers.generation import logits_process

from tersor._errors import TersorError

#: They read nothing but scores, so that all cells of a pass go through them at once.
_SCORES_ONLY = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "SuppressTokensLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
    )
)
_AXES = ("frame", "row", "column")
#: Where draws come from: one generator for all images, or one for each; None is the global state.
Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None


def prefix_mask(valid: Tensor) -> Tensor:
    """Who sees whom within a prefix: causal, and nobody sees padding.

    Args:
        valid: Bool ``[rows, tokens]``, False for padding.

    Returns:
        Bool ``[rows, 1, tokens, tokens]``, True where the first token sees the second.
    """
    tokens = valid.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=valid.device).tril()
    # Padding sees itself: a row without any visible key would give NaN.
    own = torch.eye(tokens, dtype=torch.bool, device=valid.device)
    return (causal & valid[:, None] | own)[:, None]


def additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores: 0, and the lowest number where the bool mask ``hidden`` is True."""
    blank = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return blank.masked_fill_(hidden, torch.finfo(dtype).min)


def guide(logits: Tensor, samples: int, scale: float) -> Tensor:
    """Classifier-free guidance ``u + scale * (c - u)`` of conditional logits c and unconditional ones u.

    Args:
        logits: ``[rows, ...]``, the conditional rows before the unconditional ones.
        samples: How many rows are conditional.
        scale: 1 is no guidance: the conditional rows alone.
    """
    if scale == 1:
        return logits[:samples]
    conditional, unconditional = logits.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def check_cfg_interval(cells: int, scale: float | None) -> None:
    """Raise `ValueError` unless guidance may end after so many cells, or never for -1."""
    if not isinstance(cells, int) or isinstance(cells, bool) or cells < -1:
        raise TersorError(f"cfg_interval={cells!r} must be a number of tokens, or -1 for all")
    if cells != -1 and scale is None:
        raise TersorError(f"cfg_interval={cells} ends guidance, and there is none; give guidance_scale")


def exponential(like: Tensor, generator: Generators) -> Tensor:
    """Noise of a race: the largest of ``p / noise`` is one draw from p, the one that `torch.multinomial` makes.

    Args:
        like: What the noise is for, ``[images, ...]``.
        generator: Where it comes from.
    """
    noise = torch.empty_like(like)
    if generator is None or isinstance(generator, torch.Generator):
        return noise.exponential_(generator=generator)
    for own, each in zip(noise, generator, strict=True):
        own.exponential_(generator=each)
    return noise


def stays(kept: Tensor, expected: Tensor, generator: torch.Generator | None) -> Tensor:
    """The test of speculative sampling: True with probability min(1, p / q).

    Args:
        kept: p of what is tested, any shape.
        expected: q of it, the same shape.
        generator: Of the uniform numbers.
    """
    ratio = torch.where(expected > 0, kept / expected.clamp_min(torch.finfo(expected.dtype).tiny), torch.inf)
    return torch.rand(ratio.shape, generator=generator, device=ratio.device) < ratio


def check_generators(generator: Generators, images: int, device: torch.device) -> None:
    """Raise `TersorError` unless there is one generator, or one for each image, on the model's device.

    Args:
        generator: Of a call.
        images: Of the call.
        device: The model's.
    """
    several = [generator] if isinstance(generator, torch.Generator) else [] if generator is None else generator
    if not isinstance(several, (list, tuple)) or not all(isinstance(each, torch.Generator) for each in several):
        raise TersorError(f"generator={generator!r} must be a torch.Generator, or a list with one for each image")
    if isinstance(generator, (list, tuple)) and len(several) != images:
        raise TersorError(f"{len(several)} generators for {images} images; give one, or one an image")
    for each in several:
        if each.device.type != device.type:
            raise TersorError(
                f"the generator is on {each.device}, the model on {device}: "
                f"make it with torch.Generator({str(device)!r})"
            )


def seeded(seeds: int | Sequence[int]) -> torch.Generator | list[torch.Generator]:
    """A generator of one seed, or one of each."""
    if isinstance(seeds, int):
        return torch.Generator().manual_seed(seeds)
    return [torch.Generator().manual_seed(each) for each in seeds]


def part_of(generator: Generators, first: int, last: int) -> Generators:
    """The generators of some images: of a list those from ``first`` to before ``last``, else the one of all."""
    return generator[first:last] if isinstance(generator, Sequence) else generator


@dataclass
class Sampler:
    """Draws tokens with the user's processors.

    Args:
        processors: Called as ``processor(ids, scores)``; ids are the virtual raster prefix of the cell.
        do_sample: Draw from the distribution, or take its largest entry.
        generator: Where draws come from; None is the global state, as in the library's own sampling. With one for each
            image, an image does not depend on the others of its batch.
    """

    processors: Sequence[Callable[[Tensor | None, Tensor], Tensor]]
    do_sample: bool
    generator: Generators = None

    @property
    def reads_scores_only(self) -> bool:
        """Whether no processor reads the ids before a cell."""
        return all(isinstance(each, _SCORES_ONLY) for each in self.processors)

    @property
    def shared_generator(self) -> torch.Generator | None:
        """The generator of all images, where there is no list of them."""
        assert self.generator is None or isinstance(self.generator, torch.Generator)
        return self.generator

    def process(
        self,
        scores: Tensor,
        cells: Sequence[tuple[int, ...]],
        before: Callable[[int], Tensor],
        *,
        check: bool = True,
    ) -> Tensor:
        """Run the processors over the scores of a pass.

        Args:
            scores: ``[batch, cells, vocabulary]``.
            cells: Coordinates of the cells.
            before: Gives the ids that precede the pass's cell of this number in raster order.
            check: Whether to `check` the result.
        """
        for processor in self.processors:
            if isinstance(processor, _SCORES_ONLY):
                scores = processor(None, scores.flatten(0, 1)).view_as(scores)
            else:
                scores = torch.stack(
                    [processor(before(index), scores[:, index].contiguous()) for index in range(len(cells))], dim=1
                )
        if check:
            self.check(scores, cells)
        return scores

    def check(self, scores: Tensor, cells: Sequence[tuple[int, ...]]) -> None:
        """Raise `ValueError` if nothing can be drawn for a cell, which the message names."""
        highest = scores.amax(-1)
        if math.isfinite(highest.sum().item()):
            return
        # Not a number is not above minus infinity either; infinity can be taken but has no probability.
        possible = (highest > -torch.inf) & ((highest < torch.inf) | (not self.do_sample))
        if not bool(possible.all()):
            cell = cells[int((~possible).any(0).nonzero()[0, 0])]
            name = ", ".join(f"{axis} {each}" for axis, each in zip(_AXES[-len(cell) :], cell, strict=True))
            raise TersorError(
                f"the logits leave no token for {name} of the image: every score is minus infinity, or one is infinite "
                "or not a number; check processors that constrain tokens, and the weights and their precision"
            )

    def probabilities(self, scores: Tensor) -> Tensor:
        """The distribution of the next token, float32; greedy decoding has all of it on one."""
        if self.do_sample:
            return scores.float().softmax(-1)
        return torch.zeros_like(scores, dtype=torch.float32).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)

    def draw(self, scores: Tensor) -> Tensor:
        """One id for each of ``[..., vocabulary]``."""
        if not self.do_sample:
            return scores.argmax(-1)
        # The race by which `torch.multinomial` draws one id: the same ids from the same state of the generator. Its
        # checks of the distribution, which `process` has done, and its copies would take as long again.
        distribution = self.probabilities(scores)
        return (distribution / exponential(distribution, self.generator)).argmax(-1)
