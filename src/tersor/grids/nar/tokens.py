"""Token files: pictures or clips are encoded once, before training, and read as ids from then on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from tersor import _atomic
from tersor._errors import TersorError
from tersor._images import as_seen, by_number, image_files, opened
from tersor.zoo.inspection import check_finite

_FORMAT = "tersor tokens"
#: Arrays of an ``.npz`` that may be there beside ``images``.
_CONDITIONS = ("class_labels", "text_features", "text_mask")
#: Samples encoded at once.
_BLOCK = 256


class Encoder(Protocol):
    """What an image or a video tokenizer offers here."""

    def encode(self, pixels: Tensor, /) -> Tensor:
        """Ids ``[batch, *grid]`` of floats from 0 to 1."""


@dataclass(frozen=True)
class Tokens(Dataset[dict[str, Tensor]]):
    """Ids with their conditions, as a data set of transformers' `Trainer`.

    Args:
        ids: Whole numbers ``[n, *grid]``.
        vocab_size: Ids of the tokenizer.
        conditions: ``class_labels`` ``[n]``, or ``text_features`` ``[n, tokens, width]`` and ``text_mask``
            ``[n, tokens]``; or nothing.
        class_names: By number; none where they are not known.
        tokenizer: Name or folder of what made the ids, and what its weights are known by; "" where it is not known.

    Raises:
        ValueError: If ids are outside the vocabulary, or conditions are unknown or not as many as samples.
    """

    ids: Tensor
    vocab_size: int
    conditions: dict[str, Tensor]
    class_names: tuple[str, ...] = ()
    tokenizer: tuple[str, str] = ("", "")

    def __post_init__(self) -> None:
        if self.ids.ndim not in (3, 4) or self.ids.is_floating_point() or not len(self.ids):
            raise TersorError(
                f"ids must be whole numbers [n, rows, columns] or [n, frames, rows, columns]; got {self.ids.dtype} "
                f"{tuple(self.ids.shape)}"
            )
        if int(self.ids.min()) < 0 or int(self.ids.max()) >= self.vocab_size:
            raise TersorError(
                f"ids go from {int(self.ids.min())} to {int(self.ids.max())}; a vocabulary of {self.vocab_size} has 0 "
                f"to {self.vocab_size - 1}"
            )
        for name, each in self.conditions.items():
            if name not in _CONDITIONS:
                raise TersorError(f"condition {name!r} must be one of {_CONDITIONS}")
            if len(each) != len(self.ids):
                raise TersorError(f"there are {len(each)} {name} for {len(self.ids)} samples")
        check_finite(self.conditions, "the token file")
        labels = self.conditions.get("class_labels")
        if labels is not None and (labels.ndim != 1 or labels.is_floating_point() or int(labels.min()) < 0):
            raise TersorError("class_labels must be whole numbers [n], not negative")
        if self.class_names and (labels is None or int(labels.max()) >= len(self.class_names)):
            raise TersorError(f"there are {len(self.class_names)} class names, and other class_labels")

    @property
    def grid_size(self) -> tuple[int, ...]:
        """Of a sample, in tokens."""
        return tuple(self.ids.shape[1:])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: each[0] for name, each in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A whole batch at once: stacking one sample at a time would take longer than a small model's step."""
        rows = torch.as_tensor(indices)
        ids = self.ids[rows].long().flatten(1)
        found = {name: each[rows] for name, each in self.conditions.items()}
        if "class_labels" in found:
            found["class_labels"] = found["class_labels"].long()
        if "text_features" in found:
            found["text_features"] = found["text_features"].float()
        return {"input_ids": ids, "labels": ids, **found}

    def split(self, held_out: int, *, seed: int) -> tuple[Tokens, Tokens]:
        """Training and held-out samples, drawn without replacement; a pure function of its arguments.

        Raises:
            ValueError: If one of the parts has no samples.
        """
        if not 0 < held_out < len(self):
            raise TersorError(f"{held_out} held-out samples of {len(self)}: both parts must have some")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self._part(order[held_out:]), self._part(order[:held_out])

    def _part(self, rows: Tensor) -> Tokens:
        conditions = {name: each[rows] for name, each in self.conditions.items()}
        return replace(self, ids=self.ids[rows], conditions=conditions)

    def save(self, file: str | Path) -> None:
        """Write a safetensors file; the old one stays until the new one is whole."""
        smallest = torch.uint8 if self.vocab_size <= 2**8 else torch.int16 if self.vocab_size <= 2**15 else torch.int32
        tensors = {"ids": self.ids.to(smallest).contiguous()}
        tensors |= {name: each.contiguous() for name, each in self.conditions.items()}
        known = {"class_names": json.dumps(self.class_names), "tokenizer": json.dumps(self.tokenizer)}
        _atomic.write_bytes(file, save(tensors, {"format": _FORMAT, "vocab_size": str(self.vocab_size), **known}))

    @classmethod
    def load(cls, file: str | Path) -> Tokens:
        """Read what `save` wrote; `ValueError` for another file."""
        advice = f"{file} is no token file; make one with `tersor train tokens`"
        if not Path(file).is_file():
            raise TersorError(f"{file}: no such file; make a token file with `tersor train tokens`")
        try:
            with safe_open(file, "pt") as stored:
                facts = stored.metadata() or {}
                if facts.get("format") != _FORMAT or "ids" not in stored.keys():  # noqa: SIM118 - no mapping
                    raise TersorError(advice)
                vocabulary = int(facts.get("vocab_size", ""))
                names = tuple(json.loads(facts.get("class_names", "[]")))
                name, weights = json.loads(facts.get("tokenizer", '["", ""]'))
                found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError):
            raise TersorError(advice) from None
        # Indexing and comparing want signed numbers of full width for what may be unsigned bytes.
        return cls(found.pop("ids").int(), vocabulary, found, names, (name, weights))


@dataclass(frozen=True)
class Source:
    """Pixels that are read a block at a time.

    Args:
        count: How many samples there are.
        blocks: Gives floats from 0 to 1, ``[block, channels, height, width]`` or with frames before the channels.
        conditions: See `Tokens`.
        frames: Of a clip; 0 for images.
        class_names: See `Tokens`.
    """

    count: int
    blocks: Callable[[], Iterator[Tensor]]
    conditions: dict[str, Tensor]
    frames: int = 0
    class_names: tuple[str, ...] = ()


def extract(
    source: Source, tokenizer: Encoder, on_progress: Callable[[int, int], None] = lambda done, count: None
) -> Tokens:
    """Encode all samples.

    Args:
        source: Where samples come from.
        tokenizer: Encodes them.
        on_progress: Called with how many samples are done, and how many there are.

    Raises:
        ValueError: If they do not all have the size of the first, or the tokenizer refuses them.
    """
    found: list[Tensor] = []
    for block in source.blocks():
        ids = tokenizer.encode(block)
        if found and ids.shape[1:] != found[0].shape[1:]:
            raise TersorError(f"samples have grids of {tuple(found[0].shape[1:])} and of {tuple(ids.shape[1:])} tokens")
        found.append(ids.cpu())
        on_progress(sum(map(len, found)), source.count)
    size = int(tokenizer.codebook_size)  # type: ignore[attr-defined]
    return Tokens(torch.cat(found), size, source.conditions, source.class_names)


def read_source(path: str | Path) -> Source:
    """A folder of pictures, a sub-folder for each class, or an ``.npz`` with ``images`` and their conditions.

    ``images`` are uint8 ``[n, height, width]`` or ``[n, height, width, channels]``, and of clips
    ``[n, frames, height, width, channels]``; beside them may be ``class_labels`` ``[n]``, or ``text_features`` and
    ``text_mask``.

    Raises:
        ValueError: If there are no such images, before anything is encoded.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".npz" and path.is_file():
        return _arrays(path)
    raise TersorError(f"{path}: give a folder of pictures, or an .npz with 'images'")


def _folder(folder: Path) -> Source:
    files = image_files(folder)
    classes = sorted({each.parent.relative_to(folder) for each in files}, key=by_number)
    conditions: dict[str, Tensor] = {}
    names: tuple[str, ...] = ()
    if Path(".") not in classes:
        names = tuple(each.as_posix() for each in classes)
        numbers = {each: index for index, each in enumerate(classes)}
        conditions["class_labels"] = torch.tensor([numbers[each.parent.relative_to(folder)] for each in files])
    elif len(classes) > 1:
        raise TersorError(f"{folder} holds pictures beside folders of pictures; give every class a folder, or none")
    sizes: dict[tuple[tuple[int, int], str], Path] = {}
    for file in files:  # read whole, so that a broken one is found before hours of encoding
        picture = _read(file)
        sizes.setdefault((picture.size, picture.mode), file)
    if len(sizes) > 1:
        shown = ", ".join(f"{file.name}: {size[0]} x {size[1]} {mode}" for (size, mode), file in sizes.items())
        raise TersorError(f"the pictures in {folder} must have one size and kind; there are {shown}")

    def blocks() -> Iterator[Tensor]:
        for first in range(0, len(files), _BLOCK):
            yield _as_floats(np.stack([np.asarray(_read(file)) for file in files[first : first + _BLOCK]]))

    return Source(len(files), blocks, conditions, class_names=names)


def _read(file: Path) -> Any:
    with opened(file) as picture:
        return as_seen(picture)


def _arrays(file: Path) -> Source:
    try:
        with np.load(file, allow_pickle=False) as loaded:
            arrays = {name: loaded[name] for name in loaded.files if name in ("images", *_CONDITIONS)}
    except Exception as error:  # the archive is the user's, and numpy and zipfile raise many things
        raise TersorError(f"{file} cannot be read as arrays of numbers; write it with numpy.savez") from error
    pixels = arrays.pop("images", None)
    if pixels is None or pixels.dtype != np.uint8 or pixels.ndim not in (3, 4, 5) or not math.prod(pixels.shape):
        given = "nothing" if pixels is None else f"{pixels.dtype} {pixels.shape}"
        raise TersorError(
            f"{file} must hold 'images', uint8 [n, height, width], [n, height, width, channels] or with frames, "
            f"[n, frames, height, width, channels]; it holds {given}"
        )
    if bad := [name for name, each in arrays.items() if len(each) != len(pixels)]:
        raise TersorError(f"{file}: {bad} must have an entry for each of the {len(pixels)} images")

    def blocks() -> Iterator[Tensor]:
        return (_as_floats(pixels[first : first + _BLOCK]) for first in range(0, len(pixels), _BLOCK))

    frames = pixels.shape[1] if pixels.ndim == 5 else 0
    return Source(len(pixels), blocks, {name: torch.from_numpy(each) for name, each in arrays.items()}, frames)


def _as_floats(pixels: Any) -> Tensor:
    """Channels before height and width, from 0 to 1; without channels there is one."""
    found = torch.from_numpy(np.ascontiguousarray(pixels)).float().div_(255)
    return found[:, None] if found.ndim == 3 else found.movedim(-1, -3)
