"""The authors' checkpoint of the control branch, and those of svd-temporal-controlnet: read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tersor._errors import TersorError
from tersor.drag.controlnet import SpatioTemporalControlNetModel, accumulated
from tersor.drag.maps import MOST_RADIUS

#: What only a branch with an entity map has.
_ENTITY = "controlnet_cond_embedding.blocks_feature."


def convert_draganything(
    path: str | Path, *, fold_residual_accumulation: bool = False, **changes: Any
) -> SpatioTemporalControlNetModel:
    """A branch with the weights of an original file; save it with ``save_pretrained``.

    The authors' UNet adds most residuals several times (see `accumulated`), and their weights were trained so.

    Args:
        path: A ``.safetensors`` file. One without an entity map's encoder is a branch of one map, such as depth.
        fold_residual_accumulation: Put the factors into the zero convolutions, for users who add residuals once.
        **changes: Of the sizes in `SpatioTemporalControlNetModel`, for a branch that is not as large as SVD.

    Raises:
        TersorError: If names or shapes are not all those of the branch; the message lists them.
    """
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TersorError(f"{path} cannot be read as safetensors: {error}") from None
    entity = any(name.startswith(_ENTITY) for name in weights)
    settings = dict(changes) if entity else {"entity_embedding_out_channels": (), **changes}
    with torch.device("meta"):
        model = SpatioTemporalControlNetModel(**settings)
    _check(weights, {name: tuple(each.shape) for name, each in model.state_dict().items()}, path)
    factors = accumulated([len(block.resnets) for block in model.down_blocks])
    if fold_residual_accumulation:
        for index, factor in enumerate(factors):
            for part in ("weight", "bias"):
                weights[f"controlnet_down_blocks.{index}.{part}"] *= factor
    else:
        model.register_to_config(residual_multipliers=factors)
    model.register_to_config(map_mode="official", max_radius=MOST_RADIUS)
    model.load_state_dict(weights, assign=True)
    return model.eval()  # type: ignore[no-any-return]


def _check(weights: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], path: str | Path) -> None:
    missing, unknown = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    other = [
        f"{name}: {tuple(weights[name].shape)}, not {shape}"
        for name, shape in sorted(wanted.items())
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if missing or unknown or other:
        raise TersorError(f"{path} is no such branch: missing {missing}, unknown {unknown}, other shapes {other}")
