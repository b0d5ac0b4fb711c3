"""What image tokenizers have in common: their interface, and checks of images, ids and sizes."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from tersor._errors import TersorError


class ImageTokenizer(Protocol):
    """What turns images into tokens. Pixels are floats from 0 to 1, ``[batch, channels, height, width]``."""

    @property
    def codebook_size(self) -> int:
        """Number of ids."""

    def grid_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of ids for height and width in pixels; `ValueError` if they do not divide."""

    def encode(self, images: Tensor) -> Tensor:
        """Ids ``[batch, rows, columns]``."""

    def decode(self, ids: Tensor) -> Tensor:
        """Images of ids ``[batch, rows, columns]``."""


def divided(image_size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Both sides in units of ``factor`` pixels; `ValueError` if they are no multiples of it."""
    if any(side < factor or side % factor for side in image_size):
        raise TersorError(f"image size {tuple(image_size)} must be a multiple of {factor} pixels on each side")
    return image_size[0] // factor, image_size[1] // factor


def check_images(images: Tensor, channels: int) -> None:
    """Raise `ValueError` unless ``images`` are floats with so many channels."""
    if images.ndim != 4 or images.shape[1] != channels or not images.is_floating_point():
        raise TersorError(
            f"images must be floats from 0 to 1, [batch, {channels}, height, width]; got {images.dtype} "
            f"{tuple(images.shape)}"
        )


def check_ids(ids: Tensor, codebook_size: int) -> None:
    """Raise `ValueError` unless ``ids`` are grids of ids that the codebook has."""
    if ids.ndim != 3 or ids.is_floating_point() or not bool(((ids >= 0) & (ids < codebook_size)).all()):
        raise TersorError(
            f"ids must be whole numbers from 0 to {codebook_size - 1}, [batch, rows, columns]; got {ids.dtype} "
            f"{tuple(ids.shape)}"
        )


def to_unit(pixels: Tensor) -> Tensor:
    """From [-1, 1], which the networks speak, to [0, 1]."""
    return ((pixels + 1) / 2).clamp(0, 1)
