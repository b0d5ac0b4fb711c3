"""Sparse prefill on real photographs: token ratio and time of the whole prefill, dense and sparse in turns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tersor._images import read_picture
from tersor.bench.measure import PairedTimes, time_paired
from tersor.kv.prefill.sparsity import SparsityStats
from tersor.kv.zipvl import ZipVL


@dataclass(frozen=True)
class PhotoResult:
    """One photograph: what ZipVL kept, and seconds of both prefills."""

    name: str
    stats: SparsityStats
    times: PairedTimes


@torch.no_grad()
def measure_photo(
    model: PreTrainedModel, processor: Any, file: Path, question: str, recipe: ZipVL, *, repeats: int
) -> PhotoResult:
    """Prefill of one photograph with a question, dense and sparse in turns.

    Raises:
        ValueError: If the file cannot be read as a picture.
    """
    photo = read_picture(file)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[photo], return_tensors="pt").to(model.device)

    def dense() -> None:
        model(**inputs, logits_to_keep=1)

    def sparse() -> SparsityStats:
        with recipe.on(model) as session:
            model(**inputs, logits_to_keep=1)
            return session.stats

    stats = sparse()
    times = time_paired({"dense": dense, "ZipVL": sparse}, repeats=repeats, warmup=1)
    return PhotoResult(file.name, stats, times)
