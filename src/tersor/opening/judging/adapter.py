"""A trained judge on the disk: an adapter of a checkpoint, and how the judge is to be asked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor import _atomic, zoo
from tersor._compat import older_checkpointing_names
from tersor._errors import TersorError
from tersor._lazy import require
from tersor.opening.prompts import JudgePrompt
from tersor.zoo import loading
from tersor.zoo.inspection import refused

#: Beside the adapter's weights.
FACTS, CONFIG = "judge.json", "adapter_config.json"
#: Where a checkpoint of the zoo keeps its adapter.
FOLDER = "adapter"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """How a trained judge is to be asked and read.

    Args:
        prompt: The words that it was trained with.
        temperature: Divides its log-probabilities; fitted on battles that it was not trained on.
    """

    prompt: JudgePrompt
    temperature: float = 1.0


def adapter_folder(location: str) -> Path | None:
    """The folder of the adapter that a name or folder stands for, None where it is a checkpoint without one."""
    home = zoo.path(location) if location in zoo.names() else Path(location).expanduser()
    return next((each for each in (home, home / FOLDER) if (each / CONFIG).is_file()), None)


def write_facts(folder: Path, facts: Facts) -> None:
    """Write ``judge.json`` into the folder of an adapter."""
    told = {"prompt": vars(facts.prompt), "temperature": facts.temperature}
    _atomic.write_text(folder / FACTS, json.dumps(told, indent=1) + "\n")


def read_facts(folder: Path) -> Facts:
    """What ``judge.json`` says; an adapter without one is asked with tersor's own words.

    Raises:
        TersorError: If it cannot be read.
    """
    if not (folder / FACTS).is_file():
        return Facts(prompt=JudgePrompt())
    try:
        told = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        temperature = float(told["temperature"])
        prompt = JudgePrompt(**told["prompt"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise TersorError(f"{folder / FACTS} says nothing of its judge; train it again, or remove the file") from None
    if not 0 < temperature < float("inf"):
        raise TersorError(f"{folder / FACTS}: temperature={temperature} must be a number above 0")
    return Facts(prompt=prompt, temperature=temperature)


def load_adapter(folder: Path, device: str) -> tuple[Any, Any]:
    """Model with its adapter, and the processor.

    Raises:
        TersorError: If the checkpoint that it adapts is not there, or another one.
    """
    peft: Any = require("peft", "rl")
    with refused(f"the adapter in {folder}"):
        named = str(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"])
    location = loading.resolve(named)
    model, _ = loading.load(location, device)
    with refused(f"the adapter in {folder} on {named}"), older_checkpointing_names():
        model = peft.PeftModel.from_pretrained(model, folder)
    return model, loading.load_processor(location)
