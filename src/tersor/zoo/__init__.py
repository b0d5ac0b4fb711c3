"""Small models that tersor trains itself, and the held-out book that they are asked about.

A checkpoint is a folder with safetensors, tokenizer, ``CARD.md`` and ``recipe.lock.json``; its recipe is the
script of the same name in the repository's ``recipes``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.processing_utils import ProcessorMixin

    from tersor.bench.features import DigitClassifier, Moments
    from tersor.grids.tokenizer import ImageTokenizer

_CHECKPOINTS = Path(__file__).parent / "checkpoints"
_BOOK = Path(__file__).parent / "texts" / "book.txt"


def names() -> list[str]:
    """The models in the zoo."""
    return sorted(folder.name for folder in _CHECKPOINTS.iterdir() if (folder / "config.json").is_file())


def path(name: str) -> Path:
    """The folder of a model; raises `ValueError` for an unknown name."""
    if name not in names():
        raise ValueError(f"the zoo has no model {name!r}; choose one of {names()}")
    return _CHECKPOINTS / name


def card(name: str) -> str:
    """The model card as Markdown: data, training, scores with their intervals, limits."""
    return (path(name) / "CARD.md").read_text(encoding="utf-8")


def load_model(name: str) -> PreTrainedModel:
    """The model (float32, eval mode) from the installed files alone; some models have no tokenizer."""
    folder = path(name)
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: PreTrainedModel = _model_class(folder).from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    return model.eval()


def _model_class(folder: Path) -> Any:
    """What loads a checkpoint: a class of ours, or the library's auto class for it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["architectures"] == ["LlamaGen"]:
        from tersor.grids.model import LlamaGen

        return LlamaGen
    return AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM


def load_image_tokenizer(name: str) -> ImageTokenizer:
    """What turns a model's ids into images; raises `ValueError` for a model that makes none."""
    if not (path(name) / "tokenizer" / "config.json").is_file():
        raise ValueError(f"{name} makes no images; use zoo.load({name!r}) for its tokenizer")
    from tersor.grids.tokenizer import load_tokenizer

    return load_tokenizer(path(name) / "tokenizer")


def load_judge(name: str) -> tuple[DigitClassifier, Moments]:
    """The classifier that a model's images are judged by, and the moments of its features over real ones.

    Raises `ValueError` for a model without one.
    """
    from tersor.bench.features import load_judge

    return load_judge(path(name) / "classifier")


def load_processor(name: str) -> ProcessorMixin:
    """What turns pictures and text into a model's inputs; raises `ValueError` for a model that reads no pictures."""
    if not (path(name) / "processor_config.json").is_file():
        raise ValueError(f"{name} reads no pictures; use zoo.load({name!r}) for its tokenizer")
    from tersor._processors import PictureProcessor

    processor: ProcessorMixin = PictureProcessor.from_pretrained(path(name), local_files_only=True)
    return processor


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (float32, eval mode) and tokenizer; raises `ValueError` for a model without a tokenizer."""
    if not (path(name) / "tokenizer.json").is_file():
        raise ValueError(f"{name} has no tokenizer; use zoo.load_model({name!r})")
    from transformers import AutoTokenizer

    return load_model(name), AutoTokenizer.from_pretrained(path(name), local_files_only=True)


def book() -> str:
    """A stretch of a book that no model of the zoo was trained on; ``texts/SOURCE.md`` says which."""
    return _BOOK.read_text(encoding="utf-8")
