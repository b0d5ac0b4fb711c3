"""Files of pictures: which are in a folder, and what is in one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tersor._errors import TersorError
from tersor._lazy import require

#: Endings of picture files, in small letters.
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
#: Frames of a video; each is read whole.
MOST_FRAMES = 1000


class PictureError(TersorError):
    """A file is no picture that can be read."""


def image_files(folder: Path, *, below: bool = True, option: str = "") -> list[Path]:
    """The pictures in a folder, by name.

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
    found = sorted(file for file in files if file.suffix.lower() in ENDINGS and not file.is_dir())
    if not found:
        raise TersorError(f"{option} {folder} holds no pictures ({', '.join(ENDINGS)})".lstrip())
    return found


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


def read_picture(file: Path, *, option: str = "") -> Any:
    """A picture in RGB, read whole; raises as `opened` does."""
    with opened(file, option=option) as picture:
        return picture.convert("RGB")


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
            frames.append(film.convert("RGB"))
        return frames


def _check_number(path: Path, option: str, count: int) -> None:
    if count > MOST_FRAMES:
        raise TersorError(f"{option} {path} has {count:,} frames; give at most {MOST_FRAMES:,}")
