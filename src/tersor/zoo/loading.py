"""Look at a checkpoint before anything heavy is imported or loaded, so that a bad one fails at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tersor import zoo
from tersor._errors import TersorError
from tersor._lazy import installed
from tersor.zoo.inspection import check_config, load_checked, read_config, refused

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
#: Endings of the classes that write text.
GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def resolve(name: str) -> str:
    """A zoo name becomes its folder; a folder or a hub name stays, once it has been looked at.

    Raises:
        ValueError: If it cannot be used; one line says what is wrong and what to do.
    """
    if name in zoo.names():
        return str(zoo.path(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return str(folder)
    if folder.exists():
        raise TersorError(f"{name} is a file; give the folder of a checkpoint, a hub name, or one of {zoo.names()}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise TersorError(f"{name}: no such folder; give a checkpoint's folder, a hub name, or one of {zoo.names()}")
    _check_hub(name)
    return name


def check_folder(folder: Path) -> None:
    """Check configuration, tokenizer and the headers of the weights; raises `ValueError`."""
    configuration = read_config(folder)
    if configuration.get("is_encoder_decoder"):
        raise TersorError(f"{folder} is an encoder-decoder model; tersor generate takes decoder-only models")
    architectures = configuration.get("architectures") or []
    if not any(str(each).endswith(GENERATIVE) for each in architectures):
        raise TersorError(
            f"{folder}: {' '.join(map(str, architectures)) or 'its config.json names no architecture, which'} does not "
            f"generate text; tersor generate needs a class ending in one of {', '.join(GENERATIVE)}"
        )
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise TersorError(f"{folder}: no tokenizer ({', '.join(TOKENIZER_FILES)}); save it into the folder as well")
    check_config(folder)


def is_multimodal(folder_or_name: str) -> bool:
    """Whether a local checkpoint is of a class that also reads images, which another auto class loads."""
    folder = Path(folder_or_name)
    if not folder.is_dir():
        return False
    named = read_config(folder).get("architectures") or ()
    return any(each.endswith("ForConditionalGeneration") for each in named)


def _check_hub(name: str) -> None:
    """Without network a hub name must be in the local cache; with it, loading tells."""
    if not {os.environ.get("HF_HUB_OFFLINE"), os.environ.get("TRANSFORMERS_OFFLINE")} & {"1", "true", "TRUE", "on"}:
        return
    from huggingface_hub import try_to_load_from_cache

    if isinstance(cached := try_to_load_from_cache(name, "config.json"), str):
        check_folder(Path(cached).parent)
    else:
        raise TersorError(
            f"{name}: no such folder, not one of {zoo.names()}, and not in the local hub cache (hub access is off)"
        )


def target_device(name: str) -> Any:
    """The torch device that ``--device`` names; "auto" is a GPU where there is one.

    Raises:
        ValueError: If torch does not know the device, or it is not there.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(name)
    except RuntimeError:
        raise TersorError(f"--device {name!r} is no torch device; try 'auto', 'cpu' or 'cuda'") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise TersorError(f"--device {name}: there is no CUDA device here, or torch was built without CUDA; try 'cpu'")
    return target


def load(location: str, device: str) -> tuple[Any, Any]:
    """Model (eval mode) and tokenizer of a resolved checkpoint; ``device`` may be "auto".

    Raises:
        ValueError: If it cannot be loaded; one line says why.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    target = target_device(device)
    auto = AutoModelForImageTextToText if is_multimodal(location) else AutoModelForCausalLM
    with refused(f"the tokenizer of {location}"):
        tokenizer = AutoTokenizer.from_pretrained(location)
    # Half precision is slow on most CPUs, and float32 changes nothing that a half-precision file can hold.
    model = load_checked(auto, location, dtype=torch.float32 if target.type == "cpu" else "auto")
    return model.to(target), tokenizer


def load_processor(location: str) -> Any:
    """The processor of a checkpoint; that of Qwen2-VL and 2.5 also without torchvision, which only videos need.

    Raises:
        ValueError: If it cannot be loaded; one line says why.
    """
    from transformers import AutoConfig, AutoProcessor

    from tersor.zoo.processor import PictureProcessor

    with refused(f"the processor of {location}"):
        if AutoConfig.from_pretrained(location).model_type in ("qwen2_vl", "qwen2_5_vl") and not installed(
            "torchvision"
        ):
            return PictureProcessor.from_pretrained(location)
        processor = AutoProcessor.from_pretrained(location)
    if not hasattr(processor, "image_processor"):  # the library falls back to the tokenizer and says nothing
        raise TersorError(f"{location} has no image processor that can be loaded; save the model's processor with it")
    return processor
