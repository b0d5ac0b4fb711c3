"""Lists of picture files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tersor._images import image_files


def test_pictures_are_found_by_their_ending_and_in_order(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "notes.txt", "sub/c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [each.name for each in image_files(tmp_path)] == ["a.jpg", "b.PNG", "c.webp"]
    assert [each.name for each in image_files(tmp_path, below=False)] == ["a.jpg", "b.PNG"]


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no pictures"):
        image_files(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        image_files(tmp_path / "none")
