"""Files that are either the old one or the whole new one, never half of it."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tersor._errors import TersorError


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, creating its folder; readers see the old file or the new one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path`` as `write_text` does."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as scratch:
        scratch.write_bytes(content)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A file to write to in the place of ``target``, which it replaces at the end of the block."""
    # In the same folder, because a rename is atomic only within one file system.
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(descriptor)
    try:
        yield Path(temporary)
        open_up(Path(temporary))
        os.replace(temporary, target)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError) and error.filename == temporary:  # nobody's business
            raise type(error)(error.errno, error.strerror, str(target)) from None
        raise


def try_out(path: Path, option: str, *, folder: bool) -> None:
    """Try that `path` can be written, before the work whose result it will hold; leaves nothing behind.

    Args:
        path: A file or folder that may be there or not.
        option: The option that names it, for messages.
        folder: Whether it becomes a folder.

    Raises:
        TersorError: If it is of the other kind, or cannot be made or replaced.
    """
    place = path if folder else path.parent
    try:
        if path.is_dir() and not folder:
            raise TersorError(f"{option} {path} is a folder; give a file")
        while not place.exists():
            if place.is_symlink():
                raise TersorError(f"{option} {path}: {place} is a link to nowhere; give another path")
            place = place.parent
        if not place.is_dir():
            raise TersorError(f"{option} {path}: {place} is a file, not a folder; give another path")
        # As long a name as `write_bytes` will need.
        with tempfile.NamedTemporaryFile(dir=place, prefix=f".{path.name}.", suffix=".tmp"):
            pass
    except OSError as error:
        reason = "its name is too long" if error.errno == errno.ENAMETOOLONG else error.strerror
        raise TersorError(f"{option} {path} cannot be written: {reason}; give another path") from None


def open_up(file: Path) -> None:
    """Give a file the mode of other new files: mkstemp and safetensors make private ones."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)
