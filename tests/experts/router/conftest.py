"""Untrained models of the classes that routers are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from router_models import EXPERTS, MODELS
from tiny_models import SHAPE
from transformers import LlamaConfig

from tersor import zoo


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return zoo.load("tiny-lm")[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """An untrained model of each class with its tokenizer."""
    root = tmp_path_factory.mktemp("backbones")
    config = LlamaConfig(**{**SHAPE, "vocab_size": len(tokenizer), "pad_token_id": None, "initializer_range": 0.05})
    config.num_labels = len(EXPERTS)
    for kind, build in MODELS.items():
        torch.manual_seed(0)
        build(config).save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    return {kind: root / kind for kind in MODELS}
