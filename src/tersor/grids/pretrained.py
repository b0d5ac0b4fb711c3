"""What decodes and judges the zoo's image models."""

from __future__ import annotations

from tersor import zoo
from tersor._errors import TersorError
from tersor.grids.judge import DigitClassifier, Reference
from tersor.grids.judge import load_judge as load_classifier
from tersor.grids.pixels import ImageTokenizer
from tersor.grids.tokenizer import load_tokenizer

#: Models whose images another model's classifier judges, since they have its tokens.
_JUDGES = {"tiny-nar": "tiny-raster", "tiny-nar-text": "tiny-raster"}


def load_image_tokenizer(name: str) -> ImageTokenizer:
    """What turns a model's ids into images; raises `ValueError` for a model that makes none."""
    if not (zoo.path(name) / "tokenizer" / "config.json").is_file():
        raise TersorError(f"{name} makes no images; use zoo.load({name!r}) for its tokenizer")
    return load_tokenizer(zoo.path(name) / "tokenizer")


def judge_of(name: str) -> str:
    """The model whose classifier judges the images of ``name``: itself, or the one whose tokens it has."""
    return _JUDGES.get(name, name)


def load_judge(name: str) -> tuple[DigitClassifier, Reference]:
    """The classifier that a model's images are judged by, and what it sees in real ones.

    Raises `ValueError` for a model without one.
    """
    return load_classifier(zoo.path(name) / "classifier")
