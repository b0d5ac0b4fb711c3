"""Files of pictures: which are in a folder, and what is in one."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tersor._errors import TersorError
from tersor._lazy import require

#: Endings of picture files, in small letters.
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
_DIGITS = re.compile(r"([0-9]+)")
#: What shows through transparent pixels.
BACKGROUND = "white"
#: Frames of a video; each is read whole.
MOST_FRAMES = 1000


class PictureError(TersorError):
    """A file is no picture that can be read."""


def image_files(folder: Path, *, below: bool = True, option: str = "") -> list[Path]:
    """The pictures in a folder, by name as people count: ``a2.png`` before ``a10.png``.

    Hidden files, and those in hidden folders, are no pictures of anybody's.

    Args:
        folder: Where to look.
        below: Whether to look into its sub-folders too.
        option: The option that names the folder, for messages.

    Raises:
        TersorError: If it is not a folder, or holds no picture.
    """
    if not folder.is_dir():
        raise TersorError(f"{option} {folder}: no such folder of pictures".lstrip())
    files = folder.rglob("*") if below else folder.iterdir()
    named = [file for file in files if file.suffix.lower() in ENDINGS and not file.is_dir()]
    hidden = {file for file in named if any(part.startswith(".") for part in file.relative_to(folder).parts)}
    found = sorted((file for file in named if file not in hidden), key=by_number)
    if not found:
        raise TersorError(f"{option} {folder} holds no pictures ({', '.join(ENDINGS)})".lstrip())
    return found


def by_number(path: Path) -> tuple[Any, ...]:
    """Sorts names with the numbers in them as numbers."""
    told = [[int(word) if word.isdigit() else word for word in _DIGITS.split(part)] for part in path.parts]
    return told, str(path)  # the name itself, so that "a1" and "a01" have an order, too


@contextmanager
def opened(file: Path, *, option: str = "", extra: str = "images") -> Iterator[Any]:
    """A picture as Pillow opens it; every way to open one goes through here.

    Args:
        file: The picture.
        option: The option that names it, for messages.
        extra: The extra that brings Pillow.

    Raises:
        PictureError: If it cannot be read, also within the ``with`` statement, or would unpack to an absurd size.
    """
    image: Any = require("PIL.Image", extra)
    try:
        # Pillow warns of a picture that is suspiciously large, and refuses one that is twice that.
        with warnings.catch_warnings(action="error", category=image.DecompressionBombWarning), image.open(file) as it:
            yield it
    except TersorError:
        raise
    except (image.DecompressionBombError, image.DecompressionBombWarning):
        most = f"{image.MAX_IMAGE_PIXELS:,}"
        raise PictureError(f"{option} {file} has more than {most} pixels; make it smaller".lstrip()) from None
    except Exception as error:  # Pillow's plugins raise whatever a broken file makes them stumble over
        raise PictureError(f"{option} {file} is no picture that can be read; replace it".lstrip()) from error


def read_picture(file: Path, *, option: str = "", extra: str = "images") -> Any:
    """A picture in RGB, read whole and as `as_seen` has it; raises as `opened` does."""
    with opened(file, option=option, extra=extra) as picture:
        return as_seen(picture).convert("RGB")


def as_seen(picture: Any) -> Any:
    """What a viewer shows of an opened picture, in "L" if it is grey and in "RGB" otherwise; of several frames one.

    It stands as its EXIF says, transparent pixels show `BACKGROUND`, and 16 bits become 8.

    Raises:
        PictureError: If its pixels are no shades of 8 or 16 bits.
    """
    image: Any = require("PIL.Image", "images")
    operations: Any = require("PIL.ImageOps", "images")
    turned = operations.exif_transpose(picture)
    if turned.mode == "F" or turned.mode.startswith("I"):
        turned = image.fromarray(_to_8_bits(turned, getattr(picture, "filename", "")))
    if turned.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in turned.info:
        grey = turned.mode in ("L", "LA", "La")
        ground = image.new("RGBA", turned.size, BACKGROUND)
        turned = image.alpha_composite(ground, turned.convert("RGBA")).convert("L" if grey else "RGB")
    return turned.convert("L" if turned.mode in ("1", "L") else "RGB")


def _to_8_bits(picture: Any, name: str) -> Any:
    import numpy as np

    values = np.asarray(picture)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() >= 2**16:
        raise PictureError(f"{name} has neither 8 nor 16 bits a pixel; save it with one of them".lstrip())
    return (values // 257).astype(np.uint8)


def read_frames(path: Path, *, option: str = "") -> list[Any]:
    """Frames of a video in RGB: the pictures of a folder by name, or those of an animated GIF, PNG or WebP.

    Raises:
        TersorError: If it is anything else; films must be taken apart first.
    """
    if path.is_dir():
        files = image_files(path, below=False, option=option)
        _check_number(path, option, len(files))
        return [read_picture(file, option=option) for file in files]
    if not path.is_file():
        raise TersorError(f"{option} {path}: no such file or folder")
    if path.suffix.lower() not in (".gif", ".webp", ".png", ".apng"):
        raise TersorError(
            f"{option} {path}: give an animated .gif or .webp, or a folder of frames, such as those of "
            f"ffmpeg -i {path.name} -vf fps=2 frames/%04d.png"
        )
    with opened(path, option=option) as film:
        count = getattr(film, "n_frames", 1)
        _check_number(path, option, count)
        frames = []
        for number in range(count):
            film.seek(number)
            frames.append(as_seen(film).convert("RGB"))
        return frames


def gif_bytes(frames: Sequence[Any], duration: int | list[int]) -> bytes:
    """Pictures of Pillow as one moving picture that begins anew; ``duration`` of a frame in milliseconds."""
    written = io.BytesIO()
    frames[0].save(written, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
    return written.getvalue()


def _check_number(path: Path, option: str, count: int) -> None:
    if count > MOST_FRAMES:
        raise TersorError(f"{option} {path} has {count:,} frames; give at most {MOST_FRAMES:,}")
