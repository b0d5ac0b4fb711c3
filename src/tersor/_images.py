"""Files of pictures in a folder."""

from __future__ import annotations

from pathlib import Path

#: Endings of picture files, in small letters.
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def image_files(folder: Path, *, below: bool = True, option: str = "") -> list[Path]:
    """The pictures in a folder, by name.

    Args:
        folder: Where to look.
        below: Whether to look into its sub-folders too.
        option: The option that names the folder, for messages.

    Raises:
        ValueError: If it is not a folder, or holds no picture.
    """
    if not folder.is_dir():
        raise ValueError(f"{option} {folder}: no such folder of pictures".lstrip())
    files = folder.rglob("*") if below else folder.iterdir()
    found = sorted(file for file in files if file.suffix.lower() in ENDINGS)
    if not found:
        raise ValueError(f"{option} {folder} holds no pictures ({', '.join(ENDINGS)})".lstrip())
    return found
