"""From clips to what a training of the control branch needs: latents, conditions, maps and masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from tersor.bench.measure import seed_of
from tersor.drag.data import Clip
from tersor.drag.features import entity_features
from tersor.drag.maps import Tracks, entity_vectors
from tersor.drag.objective import latent_masks
from tersor.drag.pipeline import FEATURE_SEED, DragAnythingPipeline

#: Frames that the VAE encodes at once.
_ENCODED = 8


@dataclass(frozen=True)
class Batch:
    """Clips as the models see them.

    Args:
        latents: Of the frames, ``[batch, frames, channels, rows, columns]``.
        first: Latents of the first frame, ``[batch, channels, rows, columns]``, as SVD is told them.
        told: What the image encoder says of the first frame, ``[batch, 1, width]``.
        ids: Frames a second, amount of motion and noise of the first frame, ``[batch, 3]``.
        gaussian: Maps ``[batch, frames, 3, height, width]``.
        entities: Maps ``[batch, frames, channels, height, width]``.
        masks: `latent_masks` of the entities, ``[batch, frames, rows, columns]``.
    """

    latents: Tensor
    first: Tensor
    told: Tensor
    ids: Tensor
    gaussian: Tensor
    entities: Tensor
    masks: Tensor


def planned(count: int, size: int, begin: int, end: int, *, seed: int, rank: int, ranks: int) -> Iterator[list[int]]:
    """Which clips each batch of one process is of: every pass over them in an order of its own, from any batch on.

    Args:
        count: Clips there are.
        size: Of a batch.
        begin: The first batch.
        end: Behind the last one.
        seed: Of the orders.
        rank: Of this process.
        ranks: Processes.
    """
    orders: dict[int, list[int]] = {}
    for number in range(begin, end):
        batch = []
        for place in range((number * ranks + rank) * size, (number * ranks + rank + 1) * size):
            turn = place // count
            if turn not in orders:
                orders = {turn: torch.randperm(count, generator=seeded(seed, turn)).tolist()}
            batch.append(orders[turn][place % count])
        yield batch


def seeded(seed: int, *places: int) -> torch.Generator:
    """A generator of its own for each place of a run, on the CPU."""
    for place in places:
        seed = seed_of(seed, place) % 2**63
    return torch.Generator().manual_seed(seed)


def kept_numbers(clip: Clip, dropout: float, generator: torch.Generator) -> list[int]:
    """The entities of a clip that this time are dragged, one at least.

    A user drags one to three things, where a clip's masks hold all there are.

    Args:
        clip: With its entities.
        dropout: Chance of each to be left out.
        generator: Of the draws.
    """
    numbers = clip.numbers()
    drawn = torch.rand(len(numbers), generator=generator)
    kept = [number for number, chance in zip(numbers, drawn.tolist(), strict=True) if chance >= dropout]
    return kept or [numbers[int(drawn.argmax())]]


@dataclass
class Encoder:
    """Makes of clips what a training needs, by the frozen parts of a pipeline.

    What is the same whenever a clip is drawn, its entities' features and discs and what the image encoder says of its
    first frame, is computed once and kept by the clip's name.

    Args:
        pipe: Its VAE, image encoder, entity features and way to draw maps are used.
        entity_dropout: See `kept_numbers`.
        fps: Frames a second; SVD is told one less.
        motion_bucket_id: SVD's amount of motion.
        noise_aug_strength: Standard deviation of the noise on the first frame.
    """

    pipe: DragAnythingPipeline
    entity_dropout: float
    fps: int
    motion_bucket_id: int
    noise_aug_strength: float
    _known: dict[str, tuple[Tensor, Tensor, Tracks]] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, clips: Sequence[Clip], generator: torch.Generator) -> Batch:
        """The batch of clips of as many frames on the same size; ``generator``, on the CPU, is for all draws."""
        vae, device = self.pipe.vae, self.pipe.vae.device
        pixels = torch.stack([torch.from_numpy(clip.frames) for clip in clips]).to(device)
        pixels = pixels.permute(0, 1, 4, 2, 3).to(vae.dtype) / 127.5 - 1
        laws = [vae.encode(part).latent_dist for part in torch.split(pixels.flatten(0, 1), _ENCODED)]
        latents = torch.cat([law.sample(generator) for law in laws]) * vae.config.scaling_factor
        noise = torch.randn(pixels[:, 0].shape, generator=generator).to(device, vae.dtype)
        first = vae.encode(pixels[:, 0] + self.noise_aug_strength * noise).latent_dist.mode()
        ids = torch.tensor([[self.fps - 1, self.motion_bucket_id, self.noise_aug_strength]], device=device)
        kept = [kept_numbers(clip, self.entity_dropout, generator) for clip in clips]
        known = [self._of(clip, start) for clip, start in zip(clips, (pixels[:, 0] + 1) / 2, strict=True)]
        maps = [
            self._maps(clip, own, vectors, tracks)
            for clip, own, (_, vectors, tracks) in zip(clips, kept, known, strict=True)
        ]  # fmt: skip
        covered = torch.stack([
            torch.isin(torch.from_numpy(clip.masks), torch.tensor(own)) for clip, own in zip(clips, kept, strict=True)
        ])  # fmt: skip
        rows, columns = latents.shape[-2:]
        return Batch(
            latents.unflatten(0, pixels.shape[:2]), first, torch.cat([told for told, *_ in known]),
            ids.repeat(len(clips), 1), torch.stack([near for near, _ in maps]).to(device),
            torch.stack([what for _, what in maps]).to(device), latent_masks(covered, (rows, columns)).to(device),
        )  # fmt: skip

    def _of(self, clip: Clip, start: Tensor) -> tuple[Tensor, Tensor, Tracks]:
        """What the image encoder says of a clip's first frame, and features and discs of all its entities."""
        if clip.name not in self._known:
            extractor = self.pipe.entity_feature_extractor
            assert extractor is not None  # `train` has looked
            found = extractor(start, torch.Generator().manual_seed(FEATURE_SEED))
            told = self.pipe._encode_image([Image.fromarray(clip.frames[0])], self.pipe.vae.device, 1, False)
            scene = clip.scene()
            tracks = Tracks.of(scene, max_radius=self.pipe.controlnet.config.max_radius)
            self._known[clip.name] = told, entity_features(found, scene).float().cpu(), tracks
        return self._known[clip.name]

    def _maps(self, clip: Clip, numbers: Sequence[int], vectors: Tensor, tracks: Tracks) -> tuple[Tensor, Tensor]:
        """The maps of some entities of a clip, drawn as the pipeline draws those of a scene."""
        kept = tracks.only([clip.numbers().index(number) for number in numbers])
        mode: str = self.pipe.controlnet.config.map_mode
        return self.pipe.control_maps(kept, entity_vectors(vectors), range(kept.num_frames), mode)
