"""Where the weights of base and expert are read from, tensor by tensor, and what both models are made of."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tersor._errors import TersorError
from tersor._weights import weight_files
from tersor.experts.config import BaseMismatchError
from tersor.zoo.inspection import check_config, load_checked, refused


class Source(AbstractContextManager["Source"]):
    """Weights of one model, in memory or in safetensors files, of which one tensor is read at a time."""

    def __init__(
        self,
        origin: Any,
        *,
        full_modules: tuple[str, ...] = (),
        anatomies: dict[tuple[str, ...], Anatomy] | None = None,
    ) -> None:
        """Takes a `PreTrainedModel`, a folder or a hub name; raises `ValueError` for anything else.

        Args:
            origin: Of the weights.
            full_modules: Modules whose linears count as any other tensor, as in `DeltaConfig`.
            anatomies: Of this model, by ``full_modules``; what is found out is put there.
        """
        self._anatomies = {} if anatomies is None else anatomies
        self.full_modules = full_modules
        self._open = ExitStack()
        self._tensors: dict[str, Tensor] = {}
        self._files: dict[str, Any] = {}
        self._buffers: dict[str, Tensor] = {}
        if isinstance(origin, nn.Module):
            self.config: Any = origin.config
            self.name = str(getattr(origin, "name_or_path", "") or type(origin).__name__)
            self.folder: Path | None = Path(self.name) if Path(self.name).is_dir() else None
            self._tensors = dict(origin.state_dict())
            self._buffers = dict(origin.named_buffers())
            self.architecture = type(origin)
        else:
            self.folder = check_folder(local_folder(origin))
            self.name = str(origin)
            self.config, self.architecture = read_config(self.folder)
            self._open_files(self.folder)
            made = self.anatomy
            if not {*made.linears, *made.others} <= self._files.keys():
                # Saved under other names, or in other pieces, as routed experts are: the library puts them together.
                self._tensors = dict(load_model(self.folder).state_dict())

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def _open_files(self, folder: Path) -> None:
        for path in weight_files(folder, "model.safetensors"):
            if not path.is_file():
                raise TersorError(f"{path} is missing; fetch the checkpoint again")
            try:
                file = self._open.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise TersorError(f"{path} is not a whole safetensors file ({error}); fetch it again") from None
            self._files |= dict.fromkeys(file.keys(), file)

    def check_shapes(self, expected: Mapping[str, torch.Size]) -> None:
        """See that every tensor has the shape that the model's configuration gives it, by headers alone.

        Raises:
            TersorError: Naming the first that has not.
        """
        for name, shape in expected.items():
            if name in self._tensors:
                found = list(self._tensors[name].shape)
            elif name in self._files:
                found = list(self._files[name].get_slice(name).get_shape())
            else:
                continue  # `read` says so, where it is needed
            if name in self.anatomy.transposed:
                found.reverse()
            if found != list(shape):
                raise TersorError(
                    f"{name} of {self.name} has the shape {found}, and its config.json makes it {list(shape)}; "
                    "fetch the checkpoint again"
                )

    @property
    def anatomy(self) -> Anatomy:
        """What the model is made of."""
        key = self.full_modules
        if key not in self._anatomies:
            self._anatomies[key] = Anatomy.of(self.config, self.architecture, full_modules=key)
        return self._anatomies[key]

    def names(self) -> list[str]:
        """Every tensor of the model's state, tied ones by each of their names."""
        made = self.anatomy
        return list(dict.fromkeys((*made.linears, *made.others, *made.tied, *self._tensors)))

    def check_buffers(self) -> None:
        """See that buffers which no checkpoint holds are what the configuration makes them.

        Raises:
            BaseMismatchError: Naming the first that is not, such as changed rotary frequencies.
        """
        for name, wanted in self.anatomy.derived.items():
            found = self._buffers.get(name, wanted)
            near = 2 * torch.finfo(found.dtype).eps  # of a model that was cast, they were rounded
            if found.shape != wanted.shape or not torch.allclose(found.float().cpu(), wanted, rtol=near, atol=1e-7):
                raise BaseMismatchError(
                    f"{name} of {self.name} is not what its configuration makes it; "
                    "set it in the configuration, or load the model anew"
                )

    def find(self, name: str) -> Tensor:
        """One tensor where it is stored, a linear's as ``[out, in]``; one of a file under each name that is tied to it.

        Raises:
            ValueError: If it is missing.
        """
        found = self._stored(name)
        return found.T if name in self.anatomy.transposed else found

    def _stored(self, name: str) -> Tensor:
        if name in self._tensors:
            return self._tensors[name]
        for key in (name, self.anatomy.tied.get(name, name)):
            if key in self._files:
                tensor: Tensor = self._files[key].get_tensor(key)
                return tensor
        raise TersorError(f"{self.name} has no tensor {name}; load both models and pass them instead of folders")

    def read(self, name: str) -> Tensor:
        """One tensor, in host memory.

        Raises:
            ValueError: If it is missing, or holds NaN or infinity.
        """
        tensor = self.find(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise TersorError(f"{name} of {self.name} holds NaN or infinity; the checkpoint is broken")
        return tensor.detach().cpu()


#: What is fetched of a repository of the hub: weights in safetensors, and what describes them.
FETCHED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md"]


def local_folder(location: str | os.PathLike[str]) -> Path:
    """The folder itself, or where a repository of the hub was fetched to."""
    folder = Path(location)
    if folder.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(location)):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(str(location), allow_patterns=FETCHED))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        return folder


def check_folder(folder: Path) -> Path:
    """A folder with a checkpoint of a whole model.

    Raises:
        ValueError: If it cannot be read, or is an adapter (LoRA and the like); the message says what to do.
    """
    if (folder / "adapter_config.json").is_file():
        raise TersorError(
            f"{folder} is a PEFT adapter, not a whole model: merge it first (PeftModel.merge_and_unload, then "
            "save_pretrained), or serve it through PEFT, which is smaller than a delta"
        )
    check_config(folder)
    return folder


def read_config(folder: Path) -> tuple[Any, type[nn.Module]]:
    """Configuration and class of a checkpoint."""
    import transformers

    with refused(str(folder)):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    name = (config.architectures or [None])[0]
    architecture = getattr(transformers, name or "", None)
    if architecture is None:
        raise TersorError(f"{folder}: transformers has no class {name!r}; load the model and pass it instead")
    return config, architecture


def load_model(folder: str | os.PathLike[str]) -> Any:
    """The model of a checkpoint in its own precision."""
    place = check_folder(local_folder(folder))
    build: Any = read_config(place)[1]
    return load_checked(build, place, dtype="auto", local_files_only=True)


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of, by names of its state."""

    linears: dict[str, torch.Size]
    """Weights ``[out, in]`` of the linears below the decoder layers."""
    others: dict[str, torch.Size]
    """Everything else."""
    tied: dict[str, str]
    """Names that are another tensor -> that tensor's."""
    transposed: frozenset[str]
    """Linears whose weights are stored as ``[in, out]``, as GPT-2 has them."""
    routed: dict[str, torch.Size]
    """Weights of routed experts below the decoder layers, which are stored complete if at all."""
    derived: dict[str, Tensor]
    """Buffers that no checkpoint holds, because the configuration gives them, such as rotary frequencies."""

    @classmethod
    def of(cls, config: Any, architecture: type[nn.Module], *, full_modules: tuple[str, ...] = ()) -> Anatomy:
        """Built without memory, on the meta device; ``full_modules`` as in `DeltaConfig`."""
        with refused(f"a model of class {architecture.__name__}"), torch.device("meta"):
            build: Any = architecture
            model = build._from_config(config) if hasattr(build, "_from_config") else build(config)
        tied = {}
        if getattr(config.get_text_config(), "tie_word_embeddings", False):
            tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        layers = decoder_layers(model)
        state = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
        linears: dict[str, torch.Size] = {}
        routed: dict[str, torch.Size] = {}
        transposed: set[str] = set()
        for name, module in model.named_modules():
            if not name.startswith(layers + ".") or names_one_of(name, full_modules):
                continue
            if isinstance(module, nn.Linear):
                linears[f"{name}.weight"] = module.weight.shape
            elif isinstance(module, Conv1D):
                linears[f"{name}.weight"] = module.weight.T.shape
                transposed.add(f"{name}.weight")
            elif "expert" in f"{name} {type(module).__name__}".lower():
                routed |= {f"{name}.{own}": p.shape for own, p in module.named_parameters(recurse=False) if p.dim() > 2}
        others = {name: shape for name, shape in state.items() if name not in linears}
        return cls(linears, others, tied, frozenset(transposed), routed, _derived_buffers(model))


def _derived_buffers(model: Any) -> dict[str, Tensor]:
    """Floating-point buffers of a model on the meta device that its configuration alone gives, computed."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        # Frequencies of these kinds follow the longest prompt so far: they are no part of what a model is.
        moving = any(kind in str(getattr(module, "rope_type", "")) for kind in ("dynamic", "longrope"))
        if (
            moving
            or not module._non_persistent_buffers_set
            or module._parameters
            or not hasattr(model, "_init_weights")
        ):
            continue
        made = copy.copy(module)
        made._buffers = {
            name: torch.full(buffer.shape, torch.nan if buffer.is_floating_point() else 0, dtype=buffer.dtype)
            for name, buffer in module._buffers.items()
            if buffer is not None
        }
        model._init_weights(made)
        found |= {f"{path}.{name}".lstrip("."): buffer for name, buffer in made._buffers.items()}
    return {name: each for name, each in found.items() if each.is_floating_point() and not bool(each.isnan().any())}


def names_one_of(name: str, wanted: tuple[str, ...]) -> bool:
    """Whether a module's name, or its last part, is among ``wanted``."""
    return any(name == each or name.endswith("." + each) for each in wanted)


def decoder_layers(model: nn.Module) -> str:
    """Name of the list of decoder layers: the largest `ModuleList` that is in no other.

    Raises:
        ValueError: If the model has none.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists)}
    if not outer:
        raise TersorError(f"{type(model).__name__} has no list of decoder layers")
    size: dict[str, int] = {name: sum(p.numel() for p in module.parameters()) for name, module in outer.items()}
    return max(size, key=lambda name: size[name])


def module_of(name: str) -> tuple[str, str]:
    """Module and own name of a tensor of the state."""
    module, _, own = name.rpartition(".")
    return module, own


def batches(texts: Any, tokenizer: Any, *, length: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and mask ``[size, length]`` of calibration data: texts, a dataset with a column "text", or id tensors.

    Raises:
        ValueError: If there are texts and no tokenizer.
    """
    rows = [row["text"] if isinstance(row, dict) else row for row in texts]
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        if isinstance(chunk[0], str):
            if tokenizer is None:
                raise TersorError("calibration texts need the expert's tokenizer; pass tokenizer=")
            ids = [tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in chunk]
        else:
            ids = [torch.as_tensor(row).flatten()[:length].tolist() for row in chunk]
        ids = [row for row in ids if row]
        if not ids:
            continue
        longest = max(map(len, ids))
        # Padded on the right behind a causal mask, so that no token sees the padding.
        padded = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        yield padded, mask
