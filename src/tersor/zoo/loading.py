"""Look at a checkpoint before anything heavy is imported or loaded, so that a bad one fails at once."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tersor import zoo
from tersor._errors import TersorError
from tersor._weights import weight_files

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_WEIGHTS = "model.safetensors"
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
    architectures = _configuration(folder).get("architectures") or []
    if not any(str(each).endswith(GENERATIVE) for each in architectures):
        raise TersorError(
            f"{folder}: {' '.join(map(str, architectures)) or 'its config.json names no architecture, which'} does not "
            f"generate text; tersor generate needs a class ending in one of {', '.join(GENERATIVE)}"
        )
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise TersorError(f"{folder}: no tokenizer ({', '.join(TOKENIZER_FILES)}); save it into the folder as well")
    for weights in _weight_files(folder):
        _check_safetensors(weights)


def is_multimodal(folder_or_name: str) -> bool:
    """Whether a local checkpoint is of a class that also reads images, which another auto class loads."""
    folder = Path(folder_or_name)
    if not folder.is_dir():
        return False
    return any(str(each).endswith("ForConditionalGeneration") for each in _configuration(folder)["architectures"])


def _configuration(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise TersorError(f"{folder}: no config.json; is this the folder that save_pretrained wrote?")
    try:
        configuration = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TersorError(f"{file} is not valid JSON ({error}); fetch the checkpoint again") from None
    if not isinstance(configuration, dict):
        raise TersorError(f"{file} holds no JSON object; fetch the checkpoint again")
    if configuration.get("is_encoder_decoder"):
        raise TersorError(f"{folder} is an encoder-decoder model; tersor generate takes decoder-only models")
    return configuration


def _weight_files(folder: Path) -> list[Path]:
    if not (folder / f"{_WEIGHTS}.index.json").is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise TersorError(f"{folder}: no *.safetensors; convert the weights (pickled ones are not loaded)")
        return files
    files = weight_files(folder, _WEIGHTS)
    if missing := [file.name for file in files if not file.is_file()]:
        raise TersorError(f"{folder}: {len(missing)} of {len(files)} weight files are missing, first {missing[0]}")
    return files


def _check_safetensors(file: Path) -> None:
    """The header must be JSON and its offsets must end where the file ends."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if 8 + length <= size else b""
    try:
        entries = json.loads(header)
        end = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise TersorError(f"{file} is not a safetensors file or is cut off; fetch the checkpoint again") from None
    if 8 + length + end != size:
        raise TersorError(f"{file} has {size:,} bytes but its header says {8 + length + end:,}; fetch it again")


def _check_hub(name: str) -> None:
    """Without network a hub name must be in the local cache; with it, loading tells."""
    if not {os.environ.get("HF_HUB_OFFLINE"), os.environ.get("TRANSFORMERS_OFFLINE")} & {"1", "true", "TRUE", "on"}:
        return
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
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
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    target = target_device(device)
    auto = AutoModelForImageTextToText if is_multimodal(location) else AutoModelForCausalLM
    try:
        tokenizer = AutoTokenizer.from_pretrained(location)
        # Half precision is slow on most CPUs, and float32 changes nothing that a half-precision file can hold.
        dtype = torch.float32 if target.type == "cpu" else "auto"
        model = auto.from_pretrained(location, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise TersorError(f"cannot load {location}: {error}") from error
    return model.to(target).eval(), tokenizer


def load_processor(location: str) -> Any:
    """The processor of a checkpoint; Qwen2.5-VL's also without torchvision, which only its videos need.

    Raises:
        ValueError: If it cannot be loaded; one line says why.
    """
    from transformers import AutoConfig, AutoProcessor

    from tersor.zoo.processor import PictureProcessor

    try:
        if AutoConfig.from_pretrained(location).model_type == "qwen2_5_vl" and find_spec("torchvision") is None:
            return PictureProcessor.from_pretrained(location)
        processor = AutoProcessor.from_pretrained(location)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise TersorError(f"cannot load the processor of {location}: {error}") from error
    if not hasattr(processor, "image_processor"):  # the library falls back to the tokenizer and says nothing
        raise TersorError(f"{location} has no image processor that can be loaded; save the model's processor with it")
    return processor
