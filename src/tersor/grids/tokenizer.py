"""Images to grids of ids and back: the interface, a codebook of patches, and diffusers' `VQModel`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tersor._errors import TersorError
from tersor._lazy import require
from tersor.grids.pixels import ImageTokenizer, check_ids, check_images, divided, to_unit
from tersor.grids.vq import VQTokenizer
from tersor.zoo.inspection import check_config, load_checked, read_config

__all__ = ["DiffusersTokenizer", "ImageTokenizer", "PatchTokenizer", "PatchTokenizerConfig", "load_tokenizer"]

# Distances to the codebook are computed for this many patches at once.
_BLOCK = 65_536


class PatchTokenizerConfig(PreTrainedConfig):
    """Sizes of a `PatchTokenizer`.

    Args:
        patch_size: Side of a patch in pixels.
        channels: Channels of the image.
        codebook_size: Number of patches that it knows.
        image_size: Height and width that it was fitted on.

    Raises:
        ValueError: If a size is below 1.
    """

    model_type = "tersor_patch_tokenizer"

    patch_size: int = 2
    channels: int = 1
    codebook_size: int = 128
    image_size: tuple[int, ...] | list[int] = (28, 28)

    def __post_init__(self, **kwargs: Any) -> None:
        self.image_size = tuple(self.image_size)
        for name in ("patch_size", "channels", "codebook_size"):
            if getattr(self, name) < 1:
                raise TersorError(f"{name}={getattr(self, name)} must be at least 1")
        super().__post_init__(**kwargs)


class PatchTokenizer(PreTrainedModel):
    """A codebook of patches: the id of a patch is that of its nearest entry. `fit` makes one."""

    config_class = PatchTokenizerConfig
    main_input_name = "images"

    def __init__(self, config: PatchTokenizerConfig) -> None:
        super().__init__(config)
        width = config.channels * config.patch_size**2
        self.codebook = torch.nn.Parameter(torch.zeros(config.codebook_size, width), requires_grad=False)
        self.post_init()

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        images: Tensor,
        *,
        patch_size: int,
        codebook_size: int,
        seed: int,
        rounds: int = 40,
        most_patches: int = 400_000,
        on_progress: Callable[[int, float], None] = lambda number, error: None,
    ) -> PatchTokenizer:
        """k-means on the patches of ``images``, ``[batch, channels, height, width]``, by Lloyd's algorithm.

        Args:
            images: What to fit on.
            patch_size: Side of a patch in pixels.
            codebook_size: Number of entries.
            seed: Seeds which patches are looked at, and the first codebook.
            rounds: Of the algorithm.
            most_patches: How many patches are looked at, at most.
            on_progress: Called with the number of each round and its mean squared error a pixel.

        Raises:
            ValueError: If patches do not divide the images, or there are fewer distinct patches than entries.
        """
        config = PatchTokenizerConfig(
            patch_size=patch_size, channels=images.shape[1], codebook_size=codebook_size, image_size=images.shape[2:]
        )
        model = cls(config)
        model.grid_size((images.shape[2], images.shape[3]))
        generator = torch.Generator().manual_seed(seed)
        patches = model._patches(images).flatten(0, 1)
        patches = patches[torch.randperm(len(patches), generator=generator)[:most_patches]]
        # Most patches of real images are alike; entries that start on the same one would stay there.
        distinct = patches.unique(dim=0)
        if len(distinct) < codebook_size:
            raise TersorError(f"the images have {len(distinct)} distinct patches, codebook_size is {codebook_size}")
        model.codebook.copy_(distinct[torch.randperm(len(distinct), generator=generator)[:codebook_size]])
        for number in range(rounds):
            ids, error = model._nearest(patches)
            counts = torch.bincount(ids, minlength=codebook_size)
            sums = torch.zeros_like(model.codebook).index_add_(0, ids, patches)
            used = counts > 0
            model.codebook[used] = sums[used] / counts[used, None]
            on_progress(number, error)
        return model

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    def grid_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        return divided(image_size, self.config.patch_size)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Ids ``[batch, rows, columns]`` of images ``[batch, channels, height, width]``.

        Raises:
            ValueError: If there is another number of channels, or patches do not divide the size.
        """
        check_images(images, self.config.channels)
        rows, columns = self.grid_size((images.shape[2], images.shape[3]))
        ids, _ = self._nearest(self._patches(images).flatten(0, 1))
        return ids.view(len(images), rows, columns)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Images ``[batch, channels, height, width]`` of ids ``[batch, rows, columns]``; `ValueError` for bad ids."""
        check_ids(ids, self.codebook_size)
        side = self.config.patch_size
        height, width = ids.shape[1] * side, ids.shape[2] * side
        return F.fold(self.codebook[ids].flatten(1, 2).transpose(1, 2), (height, width), side, stride=side)

    def _patches(self, images: Tensor) -> Tensor:
        """``[batch, patches, channels * side * side]``."""
        side = self.config.patch_size
        return F.unfold(images.to(self.codebook.dtype), side, stride=side).transpose(1, 2)

    def _nearest(self, patches: Tensor) -> tuple[Tensor, float]:
        """The nearest entry of each patch ``[n, width]``, and the mean squared error a pixel."""
        ids, total = [], 0.0
        half = self.codebook.square().sum(1) / 2
        for block in patches.split(_BLOCK):
            # |p - c|^2 / 2 without the term that is the same for every c.
            found = (half - block @ self.codebook.T).min(1).indices
            ids.append(found)
            total += (block - self.codebook[found]).square().sum().item()
        return torch.cat(ids), total / patches.numel()


class DiffusersTokenizer:
    """diffusers' `VQModel` as a tokenizer.

    Args:
        model: A `VQModel`, or what has its ``encode``, ``decode``, ``quantize`` and ``config``.

    Example:
        ``DiffusersTokenizer.from_pretrained("folder")``
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> DiffusersTokenizer:
        """Load a folder that `VQModel` saved as safetensors; `MissingExtraError` without diffusers."""
        model = require("diffusers", "images").VQModel
        check_config(Path(folder), "diffusion_pytorch_model.safetensors")
        return cls(load_checked(model, folder, local_files_only=True))

    @property
    def codebook_size(self) -> int:
        return int(self.model.config.num_vq_embeddings)

    def grid_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        return divided(image_size, 2 ** (len(self.model.config.block_out_channels) - 1))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Ids ``[batch, rows, columns]``; `ValueError` for other channels or a size that does not divide."""
        check_images(images, self.model.config.in_channels)
        rows, columns = self.grid_size((images.shape[2], images.shape[3]))
        latents = self.model.encode(2 * images - 1).latents
        ids = self.model.quantize(latents)[2][2]
        return ids.view(len(images), rows, columns)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Images in [0, 1] of ids ``[batch, rows, columns]``; `ValueError` for bad ids."""
        check_ids(ids, self.codebook_size)
        width = self.model.quantize.embedding.weight.shape[1]
        codes = self.model.quantize.get_codebook_entry(ids.flatten(), (*ids.shape, width))
        return to_unit(self._decode_codes(codes, ids))

    def _decode_codes(self, codes: Tensor, ids: Tensor) -> Tensor:
        # A model that looks codes up by itself wants the ids.
        given = ids.flatten() if getattr(self.model.config, "lookup_from_codebook", False) else codes
        shape = (len(ids), *ids.shape[1:], codes.shape[1])
        return self.model.decode(given, force_not_quantize=True, shape=shape).sample


def load_tokenizer(folder: str | Path) -> ImageTokenizer:
    """The image tokenizer that is saved in ``folder``: a `PatchTokenizer`, a `VQTokenizer` or a diffusers `VQModel`.

    Raises:
        ValueError: If there is none.
    """
    if not (Path(folder) / "config.json").is_file():
        raise TersorError(f"{folder} holds no image tokenizer: there is no config.json")
    config = read_config(Path(folder))
    if config.get("_class_name") == "VQModel":
        return DiffusersTokenizer.from_pretrained(folder)
    for each in (PatchTokenizer, VQTokenizer):
        if config.get("model_type") == each.config_class.model_type:
            check_config(Path(folder))
            return load_checked(each, folder, local_files_only=True)
    raise TersorError(
        f"{folder} holds no image tokenizer that is known here: PatchTokenizer, VQTokenizer, or diffusers' VQModel; "
        f"its config.json says {config.get('model_type') or config.get('_class_name')!r}"
    )
