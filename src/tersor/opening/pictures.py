"""Pictures of instances and answers: read with care, and made small enough to be shown to a judge."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tersor._errors import TersorError
from tersor._images import PictureError, read_picture
from tersor._lazy import require

#: How a picture is fitted: the longest side is limited, or it is squashed to a square.
Mode: TypeAlias = Literal["side", "square"]
#: Of the JPEG that a judge is shown.
QUALITY = 90


def read_rgb(file: Path) -> Any:
    """A picture in RGB, as a viewer shows it; see `tersor._images.opened` for what it raises."""
    return read_picture(file, extra="arena")


def fault(file: Path) -> str | None:
    """What is wrong with a picture: that it is missing, or cannot be read to its end."""
    if not file.is_file():
        return "is missing"
    try:
        read_rgb(file)
    except PictureError as error:
        return "has too many pixels" if "more than" in str(error) else "is no picture that can be read"
    return None


def fitted(picture: Any, side: int, mode: Mode = "side") -> Any:
    """A picture whose longest side is at most ``side``, or that is squashed to a square of that side."""
    if mode == "square":
        return picture.resize((side, side))
    width, height = picture.size
    scale = side / max(width, height)
    return picture if scale >= 1 else picture.resize((max(1, round(width * scale)), max(1, round(height * scale))))


def as_jpeg(file: Path, side: int, mode: Mode = "side") -> bytes:
    """The picture in ``file`` as a JPEG of at most ``side`` pixels a side."""
    buffer = io.BytesIO()
    fitted(read_rgb(file), side, mode).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def save_jpeg(picture: Any) -> bytes:
    """A picture as a JPEG without anything beside the pixels; the same picture gives the same bytes."""
    require("PIL.Image", "arena")
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def confined(root: Path, name: str) -> Path:
    """The file ``name`` below ``root``.

    Raises:
        TersorError: If it is an absolute path, or leads out of ``root``, also by a link.
    """
    path = root / name
    if Path(name).is_absolute() or not path.resolve().is_relative_to(root.resolve()):
        raise TersorError(f"{name!r} leads out of {root}")
    return path
