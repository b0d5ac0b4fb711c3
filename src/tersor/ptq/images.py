"""Images of a folder as a network takes them, and networks of timm with their weights."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tersor._errors import TersorError
from tersor._images import PictureError, as_seen, image_files, opened
from tersor._lazy import require
from tersor.bench.runs import OnProgress
from tersor.zoo.inspection import check_finite

#: A folder with a larger share of unreadable files is refused: something is wrong with all of it.
_UNREADABLE = 0.1


#: Where training scripts keep their table of weights, the averaged ones first, as timm reads them.
_TABLES = ("state_dict_ema", "model_ema", "state_dict", "model")
#: What wrappers put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.")
#: Types that training scripts keep beside weights, and that execute nothing when they are read.
_HARMLESS: list[Any] = [
    argparse.Namespace, np.dtype, np.float64(0).__reduce__()[0], np.float64, np.dtypes.Float64DType,
    np.dtypes.Float32DType, np.dtypes.Int64DType,
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What turns a picture into a network's input: resize, centre crop, normalize.

    Args:
        size: Pixels on a side of the crop.
        share: The crop's part of the resized picture's shorter side.
        interpolation: "bicubic", "bilinear" or "nearest".
        mean: Of red, green and blue from 0 to 1; subtracted.
        deviation: What the difference is divided by.
    """

    size: int
    share: float = 1.0
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    deviation: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __call__(self, picture: Any) -> Tensor:
        """Float32 ``[3, size, size]`` of a PIL image; a small one is enlarged."""
        image: Any = require("PIL.Image", "ptq")
        width, height = picture.size
        short = int(self.size / self.share)
        scale = short / min(width, height)
        picture = picture.convert("RGB").resize(
            (max(short, int(width * scale)), max(short, int(height * scale))),
            getattr(image.Resampling, self.interpolation.upper()),
        )
        left, top = (round((side - self.size) / 2) for side in picture.size)
        picture = picture.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        mean, deviation = (torch.tensor(each)[:, None, None] for each in (self.mean, self.deviation))
        return (pixels - mean) / deviation


def read_images(
    files: list[Path], preprocessing: Preprocessing, tell: OnProgress = lambda text: None
) -> tuple[Tensor, list[int]]:
    """Images ``[n, 3, size, size]`` of the files that can be read, and which of the files those are.

    Args:
        files: Pictures.
        preprocessing: What makes images of them.
        tell: Told which files were skipped, and which are small and were enlarged.

    Raises:
        ValueError: If more than a tenth cannot be read, or is smaller than the network's input: enlarged pictures have
            no fine detail to calibrate on. One is never too many, unless it is the only one.
    """
    read, kept, bad, small = [], [], [], []
    for number, file in enumerate(files):
        try:
            with opened(file, extra="ptq") as picture:
                seen = as_seen(picture)
                read.append(preprocessing(seen))
        except PictureError:
            bad.append(file)
            continue
        if min(seen.size) < preprocessing.size:
            small.append((file, seen.size))
        kept.append(number)
    allowed = min(max(1, _UNREADABLE * len(files)), len(files) - 1)
    side = preprocessing.size
    if len(bad) > allowed:
        raise TersorError(f"{len(bad)} of {len(files)} images cannot be read, {bad[0]} first; replace or remove them")
    if len(small) > allowed:
        file, (width, height) = small[0]
        raise TersorError(
            f"{file} is {width} x {height} pixels; the network takes {side} x {side}, and {len(small)} of {len(files)} "
            "images are smaller; give larger ones"
        )
    if bad:
        tell(f"skipped {len(bad)} of {len(files)} files, which cannot be read: {_listed(bad)}")
    if small:
        tell(f"enlarged {len(small)} images smaller than {side} x {side}: {_listed([file for file, _ in small])}")
    return torch.stack(read), kept


def _listed(files: list[Path]) -> str:
    return ", ".join(str(file) for file in files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")


def read_folder(
    folder: Path, preprocessing: Preprocessing, *, count: int, seed: int, tell: OnProgress = lambda text: None
) -> Tensor:
    """``count`` images of a folder, or all if there are fewer, drawn by ``seed``: ``[n, 3, size, size]``.

    ``tell`` and errors are those of `read_images`.
    """
    files = image_files(folder)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return read_images([files[index] for index in order.tolist()], preprocessing, tell)[0]


def find_classes(folder: Path, classes: int) -> list[tuple[Path, int]]:
    """Pictures of a folder that has one folder for each of ``classes`` classes, and their classes by order of name.

    Raises:
        ValueError: If there are more or fewer folders.
    """
    files = image_files(folder)
    # As torchvision's ImageFolder numbers them, which networks were trained with.
    names = sorted({file.relative_to(folder).parts[0] for file in files if file.parent != folder})
    if len(names) != classes:
        raise TersorError(f"{folder} has {len(names)} folders with images, and the network {classes} classes")
    return [(file, names.index(file.relative_to(folder).parts[0])) for file in files if file.parent != folder]


def load_timm(name: str, weights: Path, classes: int | None = None) -> tuple[nn.Module, Preprocessing]:
    """A network of timm in training form, eval mode, with the weights of a file, and its preprocessing.

    Args:
        name: As timm has it.
        weights: A table of weights, or a checkpoint of timm's training, whose averaged weights come first.
        classes: Of the head; as many as the weights have by default.

    Raises:
        ValueError: If the name is unknown, or the weights are of another network or of a merged one.
    """
    timm: Any = require("timm", "ptq")
    data: Any = require("timm.data", "ptq")
    if not timm.is_model(name.split(".")[0]):
        raise TersorError(f"--model {name!r} is neither in the zoo nor a model of timm {timm.__version__}")
    state = _read_state(weights)
    model = timm.create_model(name)
    head = f"{model.pretrained_cfg.get('classifier')}.weight"
    found = len(state[head]) if head in state else model.num_classes
    if classes is not None and classes != found:
        raise TersorError(f"--num-classes {classes}: {weights} has a head of {found} classes; leave the option out")
    if found != model.num_classes:
        model = timm.create_model(name, num_classes=found)
    merged = [key for key in state if "reparam_conv" in key]
    if merged and not any("reparam_conv" in key for key in model.state_dict()):
        raise TersorError(
            f"{weights} holds merged blocks ({merged[0]}); give the weights of {name} in training form, with branches"
        )
    differing = sorted(set(state) ^ set(model.state_dict())) or sorted(
        key for key, value in model.state_dict().items() if value.shape != state[key].shape
    )
    if differing:
        raise TersorError(
            f"{weights} does not hold the weights of {name}: {len(differing)} differ, {differing[0]} first"
        )
    model.load_state_dict(state)
    found = data.resolve_model_data_config(model)
    return model.eval(), Preprocessing(
        size=found["input_size"][-1], share=found["crop_pct"], interpolation=found["interpolation"],
        mean=tuple(found["mean"]), deviation=tuple(found["std"]),
    )  # fmt: skip


def _read_state(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a PyTorch one without executing anything from it."""
    if not file.is_file():
        raise TersorError(f"--weights {file}: no such file")
    try:
        if file.suffix == ".safetensors":
            read: Any = load_file(file)
        else:
            with torch.serialization.safe_globals(_HARMLESS):
                read = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickles fail in many ways
        raise TersorError(
            f"--weights {file} cannot be read as tensors; give a whole .safetensors, or a .pth that holds weights alone"
        ) from error
    tables: Any = read if isinstance(read, dict) else {}
    state: Any = next((tables[key] for key in _TABLES if isinstance(tables.get(key), dict)), tables)
    while state and (prefix := next((each for each in _PREFIXES if all(k.startswith(each) for k in state)), "")):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise TersorError(f"--weights {file} holds no table of weights")
    check_finite(state, f"--weights {file}")
    found: dict[str, Tensor] = state
    return found
