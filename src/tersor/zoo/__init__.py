"""Small models that tersor trains itself, and the held-out book that they are asked about.

A checkpoint is a folder with safetensors, tokenizer, ``CARD.md`` and ``recipe.lock.json``; its recipe is the
script of the same name in the repository's ``recipes``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    return model.eval()


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (float32, eval mode) and tokenizer; raises `ValueError` for a model without a tokenizer."""
    if not (path(name) / "tokenizer.json").is_file():
        raise ValueError(f"{name} has no tokenizer; use zoo.load_model({name!r})")
    from transformers import AutoTokenizer

    return load_model(name), AutoTokenizer.from_pretrained(path(name), local_files_only=True)


def book() -> str:
    """A stretch of a book that no model of the zoo was trained on; ``texts/SOURCE.md`` says which."""
    return _BOOK.read_text(encoding="utf-8")
