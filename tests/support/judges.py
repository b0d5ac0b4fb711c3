"""Judges to train: a small untrained Qwen2-VL whose tokenizer ends answers, and pairs of the scripted world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_judges import judge_parts

from tersor.opening.intjudge.config import IntJudgeConfig
from tersor.opening.intjudge.lora import adapters
from tersor.opening.intjudge.pairs import Parts, split
from tersor.opening.intjudge.run import run_intjudge
from tersor.opening.intjudge.world import SEEN, UNSEEN, World
from tersor.opening.prompts import JudgePrompt

PROMPT = JudgePrompt(system="Judge.", question="Which?")


def parts_of(folder: Path, n: int = 12) -> Parts:
    """A few pairs of both kinds, and a few to validate on."""
    world = World(folder, 0)
    instances = world.instances(n)
    arena, references = world.arena(instances, (*SEEN, *UNSEEN), 4 * n), world.references(instances, SEEN)
    return split([arena, references], unseen=[each.name for each in UNSEEN], held_out=0.5, ratio=1.0, seed=2)


def untrained(name: str = "qwen2_vl") -> tuple[Any, Any]:
    """Model and processor, whose template begins an answer by ``a:``; ``~`` ends one."""
    model, processor = judge_parts(name)
    processor.tokenizer.eos_token = "~"
    processor.chat_template += "{% if add_generation_prompt %}a:{% endif %}"
    return model, processor


def config(out: Path, **changes: Any) -> IntJudgeConfig:
    """Three updates of two pairs, saved after each."""
    settings: dict[str, Any] = {
        "output_dir": str(out), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 3,
        "gradient_checkpointing": False, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2,
        "report_to": [], "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip
    return IntJudgeConfig(**settings | changes)


def train(out: Path, parts: Parts, **changes: Any) -> dict[str, Any]:
    """A whole training in ``out``."""
    model, processor = untrained()
    return run_intjudge(
        model, processor, parts, config(out, **changes), PROMPT, facts={"model": "tiny"},
        unseen=[each.name for each in UNSEEN], peft_config=adapters(4), quiet=True,
    )  # fmt: skip
