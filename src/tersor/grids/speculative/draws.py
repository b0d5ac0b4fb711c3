"""How a draft is tested: by the cell's own noise, by the maximal coupling, or by its group.

Distributions are ``[images, cells, ids]`` and ids ``[images, cells]``, in raster order from the first undecided cell
on; ids are numbers of entries of a distribution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tersor.grids.sampling import Sampler, exponential, stays

#: Of grouped speculative decoding: neighbours in rank below and above, and how near they must be to a draft.
BELOW, ABOVE, NEAR_PROBABILITY, NEAR_EMBEDDING = 7, 6, 0.15, 0.5


class SeedExact:
    """Draft and decision are one race against noise that belongs to the cell, drawn in raster order.

    The library draws a token by such a race too, so what comes out of the last test is what raster decoding draws from
    the same generator; and while a cell's distribution hardly changes, its token stays. Greedy decoding has no noise.

    Args:
        sampler: Draws.
    """

    keeps_laws = False

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.noise: list[Tensor] = []

    def enter(self, like: Tensor, allowed: Tensor | None, *, ends_row: bool) -> None:
        """Draw the noise of the next cell.

        Args:
            like: ``[images, vocabulary]`` of the model, float32.
            allowed: Ids that a cell may hold.
            ends_row: An end-of-row token follows the cell. It is known, but the library draws it.
        """
        if not self.sampler.do_sample:
            return
        noise = exponential(like, self.sampler.generator)
        self.noise.append(noise if allowed is None else noise.index_select(-1, allowed))
        if ends_row:
            exponential(like, self.sampler.generator)

    def leave(self, cells: int) -> None:
        """The first ``cells`` cells are decided."""
        del self.noise[:cells]

    def draw(self, law: Tensor) -> Tensor:
        """Ids of the last cells that entered, by their distribution."""
        if not self.sampler.do_sample:
            return law.argmax(-1)
        return (law / torch.stack(self.noise[-law.shape[1] :], dim=1)).argmax(-1)

    def draw_at(self, law: Tensor, images: Tensor, cells: Tensor) -> Tensor:
        """Ids of cells that differ from image to image.

        Args:
            law: Their distributions.
            images: Which images, ``[rows, 1]``.
            cells: Which of the cells that entered and did not leave, ``[rows, cells]``.
        """
        if not self.sampler.do_sample:
            return law.argmax(-1)
        return (law / torch.stack(self.noise, dim=1)[images, cells]).argmax(-1)

    def random(self, images: int, cells: int, ids: int, device: torch.device) -> Tensor:
        """Any ids; not from the user's generator, whose draws belong to the cells."""
        own = torch.Generator(device).manual_seed(cells)
        return torch.randint(ids, (images, cells), generator=own, device=device)

    def test(self, law: Tensor, drafts: Tensor, before: Tensor | None) -> Tensor:
        """What the cells hold after a test; a draft is kept if it comes out again.

        Args:
            law: The cells' distributions now.
            drafts: Their drafts.
            before: The distributions that drafts were drawn from, where `keeps_laws`.
        """
        return self.draw(law)


class Coupled(SeedExact):
    """The maximal coupling: whatever comes out follows p, and a draft that follows q stays as often as it can.

    A draft x stays with probability min(1, p(x) / q(x)), else the cell is drawn from max(0, p - q).
    """

    keeps_laws = True

    def enter(self, like: Tensor, allowed: Tensor | None, *, ends_row: bool) -> None:
        """No noise is kept."""

    def draw(self, law: Tensor) -> Tensor:
        """Ids by their distribution."""
        return (law / exponential(law, self.sampler.generator)).argmax(-1)

    def random(self, images: int, cells: int, ids: int, device: torch.device) -> Tensor:
        """Any ids."""
        return torch.randint(ids, (images, cells), generator=self.sampler.shared_generator, device=device)

    def test(self, law: Tensor, drafts: Tensor, before: Tensor | None) -> Tensor:
        """See `SeedExact`."""
        assert before is not None
        rest = (law - before).clamp_min(0)
        again = ~stays(*self.masses(law, before, drafts), self.sampler.shared_generator) & (rest.sum(-1) > 1e-12)
        return drafts if not bool(again.any()) else drafts.masked_scatter(again, self.draw(rest[again]))

    def masses(self, law: Tensor, before: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
        """p and q of the drafts."""
        p, q = (each.gather(-1, drafts[..., None]).squeeze(-1) for each in (law, before))
        return p, q


class Grouped(Coupled):
    """A draft stays with the probability of its group, as in grouped speculative decoding; that changes the law.

    A group holds the ids whose rank, probability and input embedding are near the draft's.

    Args:
        sampler: Draws.
        embed: Embeds ids ``[images, tokens]``.
    """

    def __init__(self, sampler: Sampler, embed: Callable[[Tensor], Tensor]) -> None:
        super().__init__(sampler)
        self.embed = embed

    def masses(self, law: Tensor, before: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
        """p and q of the groups of the drafts."""
        order = law.argsort(dim=-1, descending=True)
        rank = (order == drafts[..., None]).int().argmax(-1, keepdim=True)
        ranks = rank + torch.arange(-ABOVE, BELOW + 1, device=law.device)
        inside = (ranks >= 0) & (ranks < law.shape[-1])
        near = order.gather(-1, ranks.clamp(0, law.shape[-1] - 1))
        p, q = (each.gather(-1, near) for each in (law, before))
        embedded, own = (self.embed(each.flatten(1)).float() for each in (near, drafts))
        distance = (embedded.view(*near.shape, -1) - own[:, :, None]).square().sum(-1)
        inside &= ((p - law.gather(-1, drafts[..., None])).abs() < NEAR_PROBABILITY) & (distance < NEAR_EMBEDDING)
        return (p * inside).sum(-1), (q * inside).sum(-1)
