"""A small vision-language model, its processor and questions for trainings of ZipR1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image

from tersor import zoo
from tersor.rl.config import ZipR1Config
from tersor.rl.data import questions

MODEL = "tiny-vlm-small"
GRID = [0.5, 0.7, 0.9, 0.975]
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (230, 210, 50)}


def drawn(n: int, *, side: int = 64, seed: int = 0) -> list[dict[str, Any]]:
    """Noise with one tile, and the question for the colour of its lower half, which tiny-vlm-small answers."""
    generator = torch.Generator().manual_seed(seed)
    names, rows = list(COLOURS), []
    for index in range(n):
        pixels = torch.randint(96, 160, (side, side, 1), generator=generator, dtype=torch.uint8).repeat(1, 1, 3)
        top, left = (8 * torch.randint(0, side // 8, (2,), generator=generator)).tolist()
        key, value = names[index % 4], names[(index // 4) % 4]
        pixels[top : top + 4, left : left + 8] = torch.tensor(COLOURS[key], dtype=torch.uint8)
        pixels[top + 4 : top + 8, left : left + 8] = torch.tensor(COLOURS[value], dtype=torch.uint8)
        prompt = [{"role": "user", "content": f"color {key}"}]
        rows.append({"prompt": prompt, "images": [Image.fromarray(pixels.numpy())], "answer": [value]})
    return rows


def data(n: int, **options: Any) -> Dataset:
    """`drawn` as a data set."""
    return questions(drawn(n, **options))


def policy(folder: Path) -> Any:
    """A copy of the model that trl can read again for its reference."""
    kept = folder / "policy"
    if not kept.is_dir():
        zoo.load_model(MODEL).save_pretrained(kept)
        zoo.load_processor(MODEL).save_pretrained(kept)
    return type(zoo.load_model(MODEL)).from_pretrained(kept, dtype=torch.float32)


def config(folder: Path, **settings: Any) -> ZipR1Config:
    """Two updates of one question with four rollouts."""
    own: dict[str, Any] = {
        "output_dir": str(folder / "run"), "per_device_train_batch_size": 4, "num_generations": 4, "thresholds": GRID,
        "max_completion_length": 2, "max_steps": 2, "learning_rate": 1e-3, "report_to": [], "logging_steps": 1,
        "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "zipvl": {"min_tokens": 0},
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return ZipR1Config(**{**own, **settings})
