"""Calibration images in the forms that users have them: tensors, arrays, lists, loaders, and pictures of 8 bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor._errors import TersorError, WrongTypeError
from tersor.bench.runs import OnProgress

#: Images that are taken of something that yields batches.
MOST = 1024
#: Where a batch that is a mapping has its images.
_KEYS = ("pixel_values", "image", "images", "input")


def as_images(given: Any, model: nn.Module, on_progress: OnProgress = lambda text: None) -> Tensor:
    """Float32 images ``[n, channels, height, width]`` as ``model`` takes them.

    Args:
        given: A tensor or an array of images; a list of images, with or without labels; or what yields batches of
            them, such as a `DataLoader`, of which `MOST` are taken. Pictures of uint8 may have their channels last, and
            are normalized as the model says: by its ``normalize``, or by mean and deviation of its ``pretrained_cfg``.
        model: What takes them.
        on_progress: Told where images are left out.

    Raises:
        TersorError: If there are none, sizes differ, or the model does not say how to normalize pictures.
    """
    if isinstance(given, Tensor | np.ndarray):
        images = _tensor(given)
    elif isinstance(given, Iterable) and not isinstance(given, str | Mapping):
        images = _gathered(given, on_progress)
    else:
        raise WrongTypeError(f"calibration must be images or batches of them, not {type(given).__name__}")
    if images.ndim != 4 or not len(images):
        raise TersorError(f"calibration must be images [n, channels, height, width], got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        if images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
            images = images.permute(0, 3, 1, 2)
        images = _normalized(images, model)
    if not images.is_floating_point():
        raise WrongTypeError(f"calibration has {images.dtype}; give floats as the model takes them, or uint8 pictures")
    return images.float().contiguous()


def _gathered(given: Iterable[Any], on_progress: OnProgress) -> Tensor:
    parts: list[Tensor] = []
    count = 0
    for each in given:
        if isinstance(each, Mapping):
            each = next((each[key] for key in _KEYS if key in each), None)
        elif isinstance(each, tuple | list) and len(each):
            each = each[0]  # and its labels
        if not isinstance(each, Tensor) and not hasattr(each, "__array_interface__"):
            raise WrongTypeError(f"calibration yields {type(each).__name__}; it must yield images or batches of them")
        part = _tensor(each)
        part = part[None] if part.ndim < 4 else part
        if parts and part.shape[1:] != parts[0].shape[1:]:
            raise TersorError(
                f"calibration has images of {list(parts[0].shape[1:])} and {list(part.shape[1:])}: make them one size"
            )
        if count + len(part) > MOST:
            on_progress(f"the first {MOST} images are taken")
        parts.append(part[: MOST - count])
        count += len(parts[-1])
        if count == MOST:
            break
    return torch.cat(parts) if parts else torch.empty(0)


def _tensor(given: Any) -> Tensor:
    return given.detach() if isinstance(given, Tensor) else torch.from_numpy(np.array(given))


def _normalized(pictures: Tensor, model: nn.Module) -> Tensor:
    if callable(normalize := getattr(model, "normalize", None)):
        found: Tensor = normalize(pictures)
        return found
    told = getattr(model, "pretrained_cfg", None) or {}
    if not {"mean", "std"} <= set(told):
        raise TersorError(
            f"{type(model).__name__} does not say how pictures of uint8 are normalized; give floats as it takes them"
        )
    mean, deviation = (torch.tensor(told[name])[:, None, None] for name in ("mean", "std"))
    return (pictures.float() / 255 - mean) / deviation
