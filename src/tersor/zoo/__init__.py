"""Small models that tersor trains itself, and the held-out book that they are asked about.

A checkpoint is a folder with safetensors, tokenizer, ``CARD.md`` and ``recipe.lock.json``; its recipe is the
script of the same name in the repository's ``recipes``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor._errors import TersorError
from tersor._lazy import HANDED_ON, members

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.processing_utils import ProcessorMixin

#: What says which class a checkpoint is of: transformers' file, and that of diffusers' pipelines.
_WHAT = ("config.json", "model_index.json")
_CHECKPOINTS = Path(__file__).parent / "checkpoints"
_BOOK = Path(__file__).parent / "texts" / "book.txt"
_PHOTOS = Path(__file__).parent / "photos"

#: Loaders and model classes of the systems, which stand above the zoo.
__getattr__, __dir__ = members(__name__, HANDED_ON[__name__])


def names() -> list[str]:
    """The models in the zoo."""
    return sorted(folder.name for folder in _CHECKPOINTS.iterdir() if any((folder / each).is_file() for each in _WHAT))


def path(name: str) -> Path:
    """The folder of a model; raises `ValueError` for an unknown name."""
    if name not in names():
        raise TersorError(f"the zoo has no model {name!r}; choose one of {names()}")
    return _CHECKPOINTS / name


def card(name: str) -> str:
    """The model card as Markdown: data, training, scores with their intervals, limits."""
    return (path(name) / "CARD.md").read_text(encoding="utf-8")


def load_model(name: str) -> PreTrainedModel:
    """The model (float32, eval mode) from the installed files alone; some models have no tokenizer."""
    return _load(path(name))


def load_compared(name: str) -> dict[str, Any]:
    """What a model is compared with, by kind: models of the same backbone and recipe (float32, eval mode)."""
    return {folder.name: _load(folder) for folder in sorted((path(name) / "compared").glob("*")) if folder.is_dir()}


def load_experts(name: str) -> dict[str, Any]:
    """Full fine-tunings of a model, by name (float32, eval mode); none of a model without any."""
    return {folder.name: _load(folder) for folder in sorted((path(name) / "experts").glob("*")) if folder.is_dir()}


def _load(folder: Path) -> PreTrainedModel:
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

    if (folder / "model_index.json").is_file():
        raise TersorError(f"{folder.name} is a pipeline; load it with tersor.drag.loading.load_pipeline")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["architectures"] == ["RepNet"]:
        raise TersorError(f"{folder.name} classifies images; load it with zoo.load_network({folder.name!r})")
    if config["architectures"][0] in HANDED_ON[__name__]:
        return __getattr__(config["architectures"][0])
    return AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM


def load_processor(name: str) -> ProcessorMixin:
    """What turns pictures and text into a model's inputs; raises `ValueError` for a model that reads no pictures."""
    if not (path(name) / "processor_config.json").is_file():
        raise TersorError(f"{name} reads no pictures; use zoo.load({name!r}) for its tokenizer")
    from tersor.zoo.processor import PictureProcessor

    processor: ProcessorMixin = PictureProcessor.from_pretrained(path(name), local_files_only=True)
    return processor


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (float32, eval mode) and tokenizer; raises `ValueError` for a model without a tokenizer."""
    if not (path(name) / "tokenizer.json").is_file():
        raise TersorError(f"{name} has no tokenizer; use zoo.load_model({name!r})")
    from transformers import AutoTokenizer

    return load_model(name), AutoTokenizer.from_pretrained(path(name), local_files_only=True)


def book() -> str:
    """A stretch of a book that no model of the zoo was trained on; ``texts/SOURCE.md`` says which."""
    return _BOOK.read_text(encoding="utf-8")


def photos() -> list[Path]:
    """Small photographs that no model of the zoo was trained on; ``photos/SOURCE.md`` says which."""
    return sorted(_PHOTOS.glob("*.jpg"))
