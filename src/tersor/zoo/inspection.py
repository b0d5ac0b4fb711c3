"""What a checkpoint's folder says of itself, checked before a model is built from it, and a loader that trusts nothing.

Nothing here imports torch before a model is really loaded, so that a bad folder is refused at once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tersor._errors import TersorError
from tersor._lazy import MissingExtraError
from tersor._weights import weight_files

WEIGHTS = "model.safetensors"

#: Sizes that are one positive number each.
_ONE = (
    *("hidden_size", "num_hidden_layers", "vocab_size", "head_dim", "n_layer", "n_layers", "n_head", "n_heads"),
    *("n_embd", "n_positions", "d_model", "num_layers", "max_position_embeddings", "num_attention_heads", "channels"),
    *("base_channels", "code_width", "codebook_size", "latent_channels", "norm_groups", "residual_blocks"),
    *("condition_tokens", "caption_size", "num_vq_embeddings", "in_channels"),
)
#: Sizes that some models give by layer or by side.
_SOME = (
    *("intermediate_size", "num_key_value_heads", "num_heads", "embed_dim", "ffn_dim", "image_size"),
    *("patch_size", "grid_size", "channel_multipliers", "block_out_channels"),
)
#: Sizes that may also be zero.
_COUNTS = ("num_classes", "head_layers", "depth")
#: Other sizes, whatever they hold: whole numbers among them must not be absurd.
_SIZE = re.compile(r"^(num|n)_|_(size|dim|channels|width|layers|heads|rank|experts)$")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "head_layers")
_POSITIONS = ("max_position_embeddings", "n_positions")
_NUMBERS = re.compile(r"(_eps|_epsilon|_theta|^initializer_range)$")
#: Weights may be packed, so that a number of the file stands for several.
_PACKED = 16
#: What is small enough for any machine, whatever the file holds.
_SMALL, _FEW_LAYERS, _LONGEST, _MOST_CELLS = 1 << 16, 1024, 1 << 31, 1_000_000


def read_config(folder: Path) -> dict[str, Any]:
    """The object in a checkpoint's ``config.json``.

    Raises:
        TersorError: If there is none.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise TersorError(f"{folder}: no config.json; is this the folder that save_pretrained wrote?")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise TersorError(f"{file} is not valid JSON; fetch the checkpoint again") from None
    if not isinstance(config, dict):
        raise TersorError(f"{file} holds no JSON object; fetch the checkpoint again")
    named = config.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(each, str) for each in named)):
        raise TersorError(f"{file}: architectures must be a list of names, not {_shown(named)}")
    return config


def read_shapes(file: Path) -> dict[str, list[int]]:
    """Shapes of the tensors of a safetensors file, from its header.

    Raises:
        TersorError: If the header is none, or does not end where the file does.
    """
    if not file.is_file():
        raise TersorError(f"{file}: no such file of weights; fetch the checkpoint again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if 8 + length <= size else b""
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        shapes = {name: [int(each) for each in entry["shape"]] for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise TersorError(f"{file} is not a safetensors file or is cut off; fetch the checkpoint again") from None
    if 8 + length + end != size:
        raise TersorError(f"{file} has {size:,} bytes but its header says {8 + length + end:,}; fetch it again")
    if not shapes:
        raise TersorError(f"{file} holds no weights; fetch the checkpoint again")
    return shapes


def check_config(folder: Path, name: str = WEIGHTS) -> dict[str, Any]:
    """See that the sizes in ``config.json`` are sizes, and of a model whose weights lie in the folder.

    Args:
        folder: A checkpoint.
        name: File of its weights, which may be an index of shards.

    Returns:
        The configuration.

    Raises:
        TersorError: Naming the field, or the file of weights that is broken.
    """
    config = read_config(folder)
    files = weight_files(folder, name)
    if name == WEIGHTS and files == [folder / name] and not files[0].is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise TersorError(f"{folder}: no *.safetensors; convert the weights (pickled ones are not loaded)")
    if missing := [file.name for file in files if not file.is_file()]:
        raise TersorError(f"{folder}: {len(missing)} of {len(files)} weight files are missing, first {missing[0]}")
    shapes = [shape for file in files for shape in read_shapes(file).values()]
    _check_fields(folder / "config.json", "", config, sum(map(math.prod, shapes)), len(shapes))
    return config


def _check_fields(file: Path, path: str, config: dict[str, Any], numbers: int, tensors: int) -> None:
    most = _PACKED * numbers + _SMALL

    def refuse(name: str, why: str) -> TersorError:
        return TersorError(f"{file}: {path}{name}={_shown(config[name])} {why}; fetch the checkpoint again")

    for name, value in config.items():
        if value is None:
            continue
        if name.endswith("_config") or name in ("rope_scaling", "rope_parameters"):
            if not isinstance(value, dict):
                raise refuse(name, "must be an object")
            if name.endswith("_config") and name != "quantization_config":
                _check_fields(file, f"{path}{name}.", value, numbers, tensors)
        elif name in _ONE and not _is_size(value):
            raise refuse(name, "must be a positive whole number")
        elif name in (*_SOME, *_COUNTS):
            parts = value if isinstance(value, list) else [value]
            if not parts or not all(_is_size(each, least=int(name not in _COUNTS)) for each in parts):
                raise refuse(name, "must be positive whole numbers")
        elif _NUMBERS.search(name) and not (_is_number(value) and value >= 0):
            raise refuse(name, "must be a number, not negative")
        limit = most
        if name in _LAYERS:
            limit = max(tensors, _FEW_LAYERS)
        elif name in _POSITIONS:
            limit = _LONGEST
        known = name in (*_ONE, *_SOME, *_COUNTS)
        if (known or _SIZE.search(name)) and any(each > limit for each in _whole(value)):
            raise refuse(name, f"is more than the {tensors:,} tensors of its weights can be of")
    _check_products(refuse, config, most)


def _check_products(refuse: Any, config: dict[str, Any], most: int) -> None:
    """Sizes that belong together: tables that must lie in the file, heads that divide the width."""
    width_name = next((name for name in ("embed_dim", "hidden_size", "n_embd", "d_model") if config.get(name)), None)
    width = config[width_name] if width_name else 0
    if not isinstance(width, int):
        return
    for name in ("vocab_size", "num_classes", "intermediate_size", "num_hidden_layers", "n_layer", "num_layers"):
        if any(each * width > most for each in _whole(config.get(name))):
            raise refuse(name, f"times {width_name}={width} is more than its weights hold")
    if math.prod(_whole(config.get("grid_size"))) > _MOST_CELLS:
        raise refuse("grid_size", f"has more than {_MOST_CELLS:,} tokens")
    heads_name = next((name for name in ("num_attention_heads", "num_heads", "n_head") if config.get(name)), None)
    heads = config[heads_name] if heads_name else 0
    if not heads_name or not isinstance(heads, int):
        return
    if config.get("head_dim") is None and width % heads:
        raise refuse(heads_name, f"must divide {width_name}={width}")
    pairs = config.get("num_key_value_heads")
    if isinstance(pairs, int) and heads % pairs:
        raise refuse("num_key_value_heads", f"must divide {heads_name}={heads}")


def _is_size(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> list[int]:
    """The whole numbers in a value, by itself or in a list."""
    return [each for each in (value if isinstance(value, list) else [value]) if _is_size(each, least=0)]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Whatever a library raises while it reads ``what`` becomes one line of ours; --debug shows the library's."""
    try:
        yield
    except (TersorError, MissingExtraError, MemoryError):
        raise
    except Exception as error:
        raise TersorError(
            f"{what} cannot be loaded ({type(error).__name__}): its files do not fit together, or are of a kind that "
            "the installed transformers does not know; fetch it again, or see tersor --debug …"
        ) from error


def load_checked(build: Any, location: Any, **options: Any) -> Any:
    """``build.from_pretrained(location)`` in eval mode, whose weights were all there and are finite.

    Args:
        build: A model class, or an auto class, of transformers, diffusers or ours.
        location: A folder, or a name of the hub.
        **options: Of ``from_pretrained``.

    Raises:
        TersorError: If it cannot be loaded, a weight is missing or has another shape, or is NaN or infinite.
    """
    with refused(str(location)):
        import transformers

        transformers.utils.logging.disable_progress_bar()
        # What the library would print as a table of many lines is in `told`, and is an error here.
        before = transformers.utils.logging.get_verbosity()
        transformers.utils.logging.set_verbosity_error()
        try:
            model, told = build.from_pretrained(location, use_safetensors=True, output_loading_info=True, **options)
        finally:
            transformers.utils.logging.set_verbosity(before)
    for kind in ("missing", "mismatched"):
        if names := sorted(str(each) for each in told.get(f"{kind}_keys") or ()):
            what = "are missing" if kind == "missing" else "have another shape than config.json says"
            raise TersorError(f"{location}: {len(names)} weights {what}, first {names[0]}; fetch the checkpoint again")
    check_finite(dict(model.named_parameters()), str(location))
    return model.eval()


def check_finite(tensors: dict[str, Any], where: str) -> None:
    """Raise `TersorError` naming the first tensor that holds NaN or infinity; reads each once, copies none."""
    for name, tensor in tensors.items():
        # Types of fewer bytes have no minimum in torch, and most of them no NaN.
        read = tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() and not tensor.is_meta
        if read and not all(math.isfinite(each) for each in tensor.detach().aminmax()):
            raise TersorError(f"{where}: {name} holds NaN or infinity; the checkpoint is broken, fetch it again")
