"""The authors' NAR checkpoints, of images and of videos: read strictly, and written back."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tersor._errors import TersorError
from tersor.grids.blocks import PUBLISHED_HEADS
from tersor.grids.geometry import check_sizes
from tersor.grids.nar.heads import NARForImageGeneration
from tersor.grids.nar.model import NARConfig
from tersor.grids.original import check_tensors, is_state

# Names of each head's norm and output, from the last axis on.
_IMAGE_HEADS = (("norm", "output"), ("medusa_norm", "medusa_output"))
_VIDEO_HEADS = (("norm_R", "output_R"), ("norm_D", "output_D"), ("norm_B", "output_B"))


def convert_nar(
    path: str | Path, *, grid_size: tuple[int, ...], num_attention_heads: int | None = None
) -> NARForImageGeneration:
    """A NAR model with the weights of an original checkpoint; save it with ``save_pretrained``.

    Args:
        path: A ``.pt`` or ``.safetensors`` file of the image or the video code. It is read without executing anything
            from it.
        grid_size: Axes in tokens that the model was trained for: (16, 16) at 256 pixels, (4, 16, 16) for UCF-101.
        num_attention_heads: Needed for widths that were not published.

    Raises:
        ValueError: If the file holds no such weights; the message lists names or shapes. LlamaGen's raster
            checkpoints have no second head: `NARForImageGeneration.from_raster` starts a training from one.
    """
    check_sizes(grid_size)
    weights = _read(path)
    names = _ours(weights, path)
    config = _config_of(weights, tuple(grid_size), num_attention_heads, path)
    # Shapes first, on a device without memory, so that a wrong file costs none.
    with torch.device("meta"):
        model = NARForImageGeneration(config)
    found = {names[name]: each for name, each in weights.items() if name in names}
    shapes = {name: tuple(each.shape) for name, each in model.state_dict().items()}
    theirs = {ours: name for name, ours in _names(config).items()}
    missing = sorted(theirs[name] for name in shapes.keys() - found.keys())
    unknown = sorted(name for name in weights if names.get(name) not in shapes)
    other = sorted(
        f"{theirs[name]}: {tuple(found[name].shape)}, not {shapes[name]}"
        for name in shapes.keys() & found.keys()
        if tuple(found[name].shape) != shapes[name]
    )
    if missing or unknown or other:
        raise TersorError(f"{path} is no NAR checkpoint: missing {missing}, unknown {unknown}, other shapes {other}")
    # Copies, so that the model does not keep the file mapped.
    model.load_state_dict({name: each.clone() for name, each in found.items()}, assign=True)
    return model.eval()


def original_state_dict(model: NARForImageGeneration) -> dict[str, Tensor]:
    """The model's weights by the authors' names, as `convert_nar` reads them; `ValueError` for a single-head model."""
    config = model.config
    if len(config.head_layers) != len(config.grid_size):
        raise TersorError("the authors' code has no names for a model with a single head")
    state = model.state_dict()
    return {name: state[ours][None] if name == "abs_pe" else state[ours] for name, ours in _names(config).items()}


def _read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, wherever the authors' trainers put them."""
    if Path(path).suffix == ".safetensors":
        loaded: Any = load_file(path)
    else:
        # The image trainer saves its command line's arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # The video trainer has the weights at model / sd.
    for key in ("model", "module", "state_dict", "sd"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    weights = {name: each for name, each in check_tensors(loaded, path).items() if not is_state(name)}
    if "abs_pe" in weights:
        weights["abs_pe"] = weights["abs_pe"].squeeze(0)
    return weights


def _ours(weights: dict[str, Tensor], path: str | Path) -> dict[str, str]:
    """Our names by theirs; raises `ValueError` for a raster checkpoint and for what is neither kind."""
    if "medusa_output.weight" in weights:
        heads: tuple[tuple[str, str], ...] = _IMAGE_HEADS
    elif "output_R.weight" in weights:
        heads = _VIDEO_HEADS
    elif "output.weight" in weights and "norm.weight" in weights:
        raise TersorError(
            f"{path} is a raster LlamaGen checkpoint: it has no head for the cell below and would make noise. Read it "
            "with convert_llamagen, and start a training with NARForImageGeneration.from_raster"
        )
    else:
        raise TersorError(f"{path} is no NAR checkpoint: it has {sorted(weights)[:8]} and so on")
    head_names = {
        f"{theirs}.weight": f"{ours}.{head}.weight"
        for head, pair in enumerate(heads)
        for theirs, ours in zip(pair, ("norms", "outputs"), strict=True)
    }
    return {name: head_names.get(name, "model.positions" if name == "abs_pe" else f"model.{name}") for name in weights}


def _names(config: NARConfig) -> dict[str, str]:
    """Every name that a checkpoint of this configuration has, theirs to ours."""
    with torch.device("meta"):
        ours = NARForImageGeneration(config).state_dict().keys()
    heads = _IMAGE_HEADS if len(config.grid_size) == 2 else _VIDEO_HEADS
    found = {}
    for name in ours:
        if match := re.fullmatch(r"(norms|outputs)\.(\d)\.weight", name):
            found[f"{heads[int(match[2])][match[1] == 'outputs']}.weight"] = name
        else:
            found["abs_pe" if name == "model.positions" else name.removeprefix("model.")] = name
    return found


def _config_of(
    weights: dict[str, Tensor], grid_size: tuple[int, ...], heads: int | None, path: str | Path
) -> NARConfig:
    """Sizes as the weights have them; raises `ValueError` where they do not tell."""
    video = "output_R.weight" in weights
    axes = 3 if video else 2
    if len(grid_size) != axes:
        raise TersorError(
            f"{path} is of {'videos' if video else 'images'}: grid_size={grid_size} must have {axes} axes"
        )
    tokens, wqkv = weights.get("tok_embeddings.weight"), weights.get("layers.0.attention.wqkv.weight")
    classes = weights.get("cls_embedding.embedding_table.weight")
    null = weights.get("cls_embedding.uncond_embedding")
    condition = null if classes is None else classes
    if tokens is None or wqkv is None or condition is None or not tokens.ndim == wqkv.ndim == condition.ndim == 2:
        raise TersorError(f"{path} is no NAR checkpoint: it has {sorted(weights)[:8]} and so on")
    vocabulary, width = tokens.shape
    heads = heads or PUBLISHED_HEADS.get(width)
    if heads is None:
        raise TersorError(f"no published NAR is {width} wide; give num_attention_heads")
    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": len(layers) - (axes - 1),
        "num_attention_heads": heads,
        "num_key_value_heads": (wqkv.shape[0] - width) * heads // (2 * width),
        "grid_size": grid_size,
        "position_type": "learned" if video else "rope",
    }
    if null is not None:
        return NARConfig(**settings, condition="text", condition_tokens=null.shape[0], caption_size=null.shape[1])
    return NARConfig(**settings, num_classes=condition.shape[0] - 1)
