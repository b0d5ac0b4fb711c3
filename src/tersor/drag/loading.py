"""From what a command is told to a pipeline: checkpoint, control branch and entity features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from tersor import zoo
from tersor._errors import TersorError
from tersor.drag.controlnet import SpatioTemporalControlNetModel
from tersor.drag.features import DiffusionFeatures, DinoFeatures, EntityFeatureExtractor, VaeFeatures
from tersor.drag.pipeline import DragAnythingPipeline
from tersor.zoo.inspection import load_checked, refused

#: Kinds of entity features, as ``--features`` names them.
KINDS = ("vae", "diffusion:FOLDER", "dino:FOLDER")
#: Channels of the stages of the authors' encoder of Gaussian maps.
_WIDTHS = (16, 32, 96, 256)


def load_pipeline(
    model: str,
    controlnet: Path | None = None,
    features: str | None = None,
    device: str = "cpu",
    *,
    begin: bool = False,
) -> DragAnythingPipeline:
    """A pipeline that is ready to render or to train.

    Args:
        model: Zoo name, folder or hub name of a Stable Video Diffusion pipeline.
        controlnet: Folder of the branch; left out, the one that lies in the folder of the model.
        features: One of `KINDS`; left out, the autoencoder's, if the branch was trained on those.
        device: Where to compute.
        begin: Make a branch that changes nothing yet where there is none.

    Raises:
        TersorError: If a part cannot be loaded, or the features are not the branch's.
    """
    location = str(zoo.path(model)) if model in zoo.names() else model
    kind, _, place = (features or "vae").partition(":")
    if kind not in ("vae", "diffusion", "dino") or bool(place) == (kind == "vae"):
        raise TersorError(f"--features {features!r} must be one of {KINDS}")
    if controlnet is None and (Path(location) / "controlnet").is_dir():
        controlnet = Path(location) / "controlnet"
    if controlnet is None and not begin:
        raise TersorError(f"--model {model} has no control branch; give --controlnet, see `tersor drag convert`")
    branch = None
    if controlnet is not None:
        branch = load_checked(SpatioTemporalControlNetModel, controlnet, local_files_only=True)
        known = (branch.config.entity_features or {}).get("kind", "vae")
        if features is None and known != "vae":
            raise TersorError(f"--controlnet was trained on {branch.config.entity_features}; give --features")
    logging.disable_progress_bar()
    with refused(f"--model {model}"):
        pipe = DragAnythingPipeline.from_pretrained(location, controlnet=branch)
    # Half precision is slow on a CPU, and a training chooses its own.
    dtype = torch.float32 if device == "cpu" or begin else torch.float16
    for part in (pipe.vae, pipe.image_encoder, pipe.unet, *([branch] if branch is not None else [])):
        torch.nn.Module.to(part, dtype)
    pipe.entity_feature_extractor = _extractor(kind, place or model, pipe, device)
    if branch is None:
        pipe.register_modules(controlnet=new_branch(pipe, pipe.entity_feature_extractor))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)  # type: ignore[no-any-return]


def new_branch(pipe: Any, features: EntityFeatureExtractor) -> SpatioTemporalControlNetModel:
    """A branch for a pipeline that changes nothing yet, with encoders that halve as often as its VAE.

    Args:
        pipe: Has ``unet`` and ``vae_scale_factor``.
        features: What entities are known by.

    Raises:
        TersorError: If the features' channels are odd: the branch takes the means of pairs (section 3.3).
    """
    record = features.record
    stages = pipe.vae_scale_factor.bit_length()
    if record["channels"] % 2 or stages > len(_WIDTHS):
        raise TersorError(f"a branch takes an even number of channels; these features have {record['channels']}")
    widths = _WIDTHS[:stages]
    half = record["channels"] // 2
    entity = (half, *(max(half, width) for width in widths[1:]))
    return SpatioTemporalControlNetModel.from_unet(  # type: ignore[no-any-return]
        pipe.unet, conditioning_embedding_out_channels=widths, entity_embedding_out_channels=entity,
        entity_features=record,
    )  # fmt: skip


def _extractor(kind: str, place: str, pipe: Any, device: str) -> EntityFeatureExtractor:
    if kind == "vae":
        return VaeFeatures(pipe.vae, place)
    with refused(f"--features {kind}:{place}"):
        if kind == "dino":
            from transformers import AutoModel

            return DinoFeatures(AutoModel.from_pretrained(place).eval().to(device), place)
        from diffusers import StableDiffusionPipeline

        with torch.device(device):
            return DiffusionFeatures(StableDiffusionPipeline.from_pretrained(place).to(device), place)
