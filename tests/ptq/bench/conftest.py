"""An archive as the recipes and the benchmark take it."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tersor import zoo
from tersor.ptq.bench.data import ARCHIVE, photo_crops

CLASSES = zoo.load_network("tiny-repvgg").config.classes


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """An archive as the recipes and the benchmark take it, of photographs' squares with classes at random."""
    folder = tmp_path_factory.mktemp("data")
    crops = photo_crops(zoo.photos()[:4])
    with zipfile.ZipFile(folder / ARCHIVE, "w") as archive:
        for index, pixels in enumerate(crops[:80]):
            stored = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(stored, "JPEG")
            part = "train" if index < 40 else "test"
            archive.writestr(f"{part}/{CLASSES[index % 10]}/{index:04}.jpg", stored.getvalue())
    return folder
