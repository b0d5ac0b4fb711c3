"""One expert as a packed delta: its tensors, and the folder that they are saved in.

    delta_config.json          what was made from what, and every linear with its shape, bits and error
    delta_model.safetensors    (in shards with an index where it is large)
    README.md                  the card; and the expert's own tokenizer, chat template and generation settings

A linear ``name`` is ``name.qweight``, ``name.step``, ``name.salient_index`` and ``name.salient_weight``; a tensor that
is stored complete keeps its name, and one that equals the base's is not stored.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tersor import _atomic
from tersor._errors import TersorError
from tersor._weights import save_tensors, weight_files
from tersor.experts.config import DeltaConfig, DeltaFormatError
from tersor.experts.identity import Hashes, model_hash
from tersor.experts.quantizer import Grid
from tersor.experts.sources import local_folder
from tersor.lowbit.kernels.delta_linear import PackedDelta
from tersor.lowbit.packing import packed_width, unpack_half_split

FORMAT_VERSION = 2
MANIFEST, WEIGHTS = "delta_config.json", "delta_model.safetensors"
SHARD_BYTES = 5 * 10**9
PARTS = ("qweight", "step", "salient_index", "salient_weight")
#: Files of the expert's folder that travel with it.
COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


@dataclass(frozen=True)
class Linear:
    """One packed linear: ``shape`` ``[out, in]``, ``error`` of the delta relative to its size, before distillation."""

    shape: tuple[int, int]
    bits: int
    salient: int
    midrise: bool
    error: float
    salient_dtype: str

    @property
    def grid(self) -> Grid:
        """What its codes stand for."""
        return Grid(self.bits, self.midrise)

    def layout(self) -> dict[str, tuple[list[int], tuple[str, ...]]]:
        """Shape and possible safetensors dtypes of each part."""
        out, dim = self.shape
        kinds = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
        return {
            "qweight": ([out, packed_width(dim, self.bits)], ("U8",)),
            "step": ([out], ("F16", "F32")),
            "salient_index": ([self.salient], ("I32",)),
            "salient_weight": ([out, self.salient], (kinds[self.salient_dtype],)),
        }


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``delta_config.json`` says."""

    base_model_name_or_path: str
    base_revision: str | None
    base_fingerprint: str
    """Of all its numbers, as `identity.model_hash` gives it; below, of the expert's."""
    base_tensors: Hashes
    expert_fingerprint: str
    calibration: str | None
    """Hash of the calibration data, or None where there was none."""
    expert_model_name_or_path: str
    architectures: list[str]
    config: DeltaConfig
    expert_config: dict[str, Any]
    generation_config: dict[str, Any]
    """How the expert generates, where no generation_config.json lies beside this file."""
    modules: dict[str, Linear]
    full: list[str]
    same: list[str]
    tied: dict[str, str]
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def identity(self) -> dict[str, Any]:
        """What it was made of, as `compress.Job` has it."""
        return {
            "config": self.config.to_dict(),
            "base": self.base_fingerprint,
            "expert": self.expert_fingerprint,
            "calibration": self.calibration,
        }

    def to_json(self) -> str:
        """The file's text."""
        values = asdict(self) | {"config": self.config.to_dict()}
        return json.dumps(values, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """What `to_json` wrote; raises `DeltaFormatError` for anything else, and for a newer format."""
        try:
            values = json.loads(text, object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise DeltaFormatError(f"{MANIFEST} is not valid JSON: {error}") from None
        if not isinstance(values, dict) or not isinstance(values.get("format_version"), int):
            raise DeltaFormatError(f"{MANIFEST} names no format_version; is this a delta that tersor wrote?")
        if values["format_version"] < FORMAT_VERSION:
            raise DeltaFormatError(
                f"the delta has format {values['format_version']}, which does not say which tensors of its base it "
                "relies on: pack it again"
            )
        if values["format_version"] > FORMAT_VERSION:
            raise DeltaFormatError(
                f"the delta has format {values['format_version']}, this tersor reads up to {FORMAT_VERSION}: upgrade it"
            )
        names = {each.name for each in fields(cls)}
        if set(values) != names:
            raise DeltaFormatError(f"{MANIFEST} has fields {sorted(values)}, expected {sorted(names)}")
        try:
            values["config"] = DeltaConfig.from_dict(values["config"])
            values["modules"] = {name: _linear(name, entry) for name, entry in values["modules"].items()}
            for name in (*values["modules"], *values["full"], *values["same"], *values["tied"].values()):
                _check_name(name)
            if not all(isinstance(values[name], str) for name in ("base_fingerprint", "base_model_name_or_path")):
                raise DeltaFormatError(f"{MANIFEST} does not name its base")
            values["base_tensors"] = {name: (short, full) for name, (short, full) in values["base_tensors"].items()}
            if model_hash(values["base_tensors"]) != values["base_fingerprint"]:
                raise DeltaFormatError(f"{MANIFEST} names another base than the hashes that it lists; fetch it again")
        except DeltaFormatError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise DeltaFormatError(f"{MANIFEST} is inconsistent: {error}") from None
        return cls(**values)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise TersorError("a name occurs twice")
    return found


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DeltaFormatError(f"{MANIFEST} names a tensor {name!r}; names are parts of letters and digits with dots")


def _linear(name: str, entry: dict[str, Any]) -> Linear:
    linear = Linear(**entry)
    out, dim = linear.shape
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (out, dim, linear.salient))
    if not whole or out < 1 or dim < 1 or not 0 <= linear.salient <= dim:
        raise DeltaFormatError(f"{name}: shape {linear.shape} with {linear.salient} salient channels is impossible")
    DeltaConfig(bits=linear.bits, salient_dtype=linear.salient_dtype)
    return Linear(**{**entry, "shape": (out, dim)})


@dataclass(eq=False)
class ExpertDelta:
    """An expert without its base."""

    manifest: Manifest
    tensors: dict[str, Tensor]
    """By name, as the module's docstring says."""
    folder: Path | None = None
    """Where its tokenizer and the like are, if anywhere."""

    def packed(self, name: str) -> PackedDelta:
        """The delta of one linear for the kernels."""
        linear = self.manifest.modules[name]
        codes, step, index, weight = (self.tensors[f"{name}.{part}"] for part in PARTS)
        return PackedDelta(codes, step, index, weight, linear.bits, linear.grid.zero, linear.shape[1])

    def dense(self, name: str) -> Tensor:
        """``D^`` ``[out, in]`` of one linear, float32; for `merge` and for checks, never for serving."""
        linear, packed = self.manifest.modules[name], self.packed(name)
        delta = linear.grid.decode(unpack_half_split(packed.codes, packed.bits, packed.dim), packed.step)
        index = packed.salient_index.long()
        delta[:, index] += packed.salient_weight.float()
        return delta

    def tensor(self, name: str) -> Tensor | None:
        """A tensor that is stored complete, also under a name that is tied to it; None where it equals the base's."""
        return self.tensors.get(self.manifest.tied.get(name, name))

    def to(self, device: torch.device | str) -> ExpertDelta:
        """The same delta with its tensors on ``device``; nothing is copied where they already are."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return ExpertDelta(self.manifest, moved, self.folder)

    def bytes_by_part(self) -> dict[str, int]:
        """Bytes of codes, steps, salient channels and complete tensors; they add up to `nbytes`."""
        found = dict.fromkeys(("codes", "steps", "salient", "full"), 0)
        kinds = {"qweight": "codes", "step": "steps", "salient_index": "salient", "salient_weight": "salient"}
        for name, tensor in self.tensors.items():
            module, _, part = name.rpartition(".")
            kind = kinds[part] if module in self.manifest.modules and part in kinds else "full"
            found[kind] += tensor.nbytes
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def save_pretrained(self, folder: str | os.PathLike[str], *, quality: str = "") -> None:
        """Write the folder; ``quality`` is Markdown for the card. The manifest comes last and makes it valid."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / MANIFEST).unlink(missing_ok=True)
        shards = _shards(self.tensors)
        marks = {"format_version": str(FORMAT_VERSION), "base_fingerprint": self.manifest.base_fingerprint}
        for name, shard in shards.items():
            save_tensors(target / name, shard, metadata=marks)
        if len(shards) > 1:
            index = {key: name for name, shard in shards.items() for key in shard}
            _atomic.write_text(target / f"{WEIGHTS}.index.json", json.dumps({"weight_map": index}, indent=1) + "\n")
        generation = generation_settings(self.manifest, self.folder)
        self.copy_companions(target)
        _atomic.write_text(target / "generation_config.json", json.dumps(generation, indent=2, sort_keys=True) + "\n")
        _atomic.write_text(target / "README.md", card(self, quality))
        _atomic.write_text(target / MANIFEST, self.manifest.to_json())

    def copy_companions(self, target: Path) -> None:
        """Copy the expert's tokenizer, chat template and generation settings, where it has them."""
        for name in COMPANIONS:
            if self.folder is not None and (self.folder / name).is_file() and self.folder != target:
                shutil.copyfile(self.folder / name, target / name)

    @classmethod
    def from_pretrained(cls, location: str | os.PathLike[str]) -> ExpertDelta:
        """Read a folder, or a repository of the hub.

        Raises:
            DeltaFormatError: If files are missing, cut off, inconsistent, or of a newer format.
        """
        folder = local_folder(location)
        manifest = read_manifest(folder)
        tensors: dict[str, Tensor] = {}
        for file in _weight_files(folder):
            try:
                with safe_open(file, framework="pt") as opened:
                    _check_marks(file, opened.metadata() or {}, manifest)
                    names = opened.keys()
                    if twice := sorted(set(names) & set(tensors)):
                        raise DeltaFormatError(f"{file} holds {twice[0]} a second time")
                    _check_layout(file, opened, manifest)
                    tensors |= {name: opened.get_tensor(name) for name in names}
            except (SafetensorError, OSError) as error:
                raise DeltaFormatError(f"{file} is not a whole safetensors file: {error}") from None
        expected = {f"{name}.{part}" for name in manifest.modules for part in PARTS} | set(manifest.full)
        if missing := sorted(expected - set(tensors)):
            raise DeltaFormatError(f"{folder} lacks {len(missing)} tensors, first {missing[0]}; fetch it again")
        delta = cls(manifest, tensors, folder)
        for name, linear in manifest.modules.items():
            _check_numbers(name, linear, delta.packed(name))
        return delta


def generation_settings(manifest: Manifest, folder: Path | None) -> dict[str, Any]:
    """How an expert generates: as the file in its folder says, which may be edited, or as it was packed."""
    file = None if folder is None else folder / "generation_config.json"
    if file is None or not file.is_file():
        return manifest.generation_config
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise DeltaFormatError(f"{file} is not valid JSON; fetch the delta again")
    return values


def read_manifest(location: str | os.PathLike[str]) -> Manifest:
    """The manifest alone, without reading a tensor."""
    file = local_folder(location) / MANIFEST
    if not file.is_file():
        raise DeltaFormatError(f"{location}: no {MANIFEST}; give the folder that `tersor experts pack` wrote")
    return Manifest.from_json(file.read_text(encoding="utf-8", errors="replace"))


def _weight_files(folder: Path) -> list[Path]:
    try:
        files = weight_files(folder, WEIGHTS)
    except ValueError as error:
        raise DeltaFormatError(str(error)) from None
    for file in files:
        if not file.is_file():
            raise DeltaFormatError(f"{file} is missing; fetch the delta again")
    return files


def _check_marks(file: Path, marks: dict[str, str], manifest: Manifest) -> None:
    if marks.get("base_fingerprint") != manifest.base_fingerprint:
        raise DeltaFormatError(f"{file} and {MANIFEST} belong to different bases; fetch the delta again")
    if marks.get("format_version") != str(manifest.format_version):
        raise DeltaFormatError(f"{file} has format {marks.get('format_version')}, {MANIFEST} says otherwise")


def _check_layout(file: Path, opened: Any, manifest: Manifest) -> None:
    """Names, shapes and dtypes from the header, before a tensor is read."""
    for key in opened.keys():  # noqa: SIM118 - a safetensors file is no mapping
        module, _, part = key.rpartition(".")
        if module in manifest.modules and part in PARTS:
            piece = opened.get_slice(key)
            shape, dtypes = manifest.modules[module].layout()[part]
            if list(piece.get_shape()) != shape or piece.get_dtype() not in dtypes:
                raise DeltaFormatError(
                    f"{file}: {key} is {piece.get_dtype()} {list(piece.get_shape())}, {MANIFEST} says "
                    f"{' or '.join(dtypes)} {shape}"
                )
        elif key not in manifest.full:
            raise DeltaFormatError(f"{file} holds {key}, which {MANIFEST} does not name")


def _check_numbers(name: str, linear: Linear, packed: PackedDelta) -> None:
    """What kernels rely on: channels in range and ascending, finite numbers."""
    index = packed.salient_index
    if index.numel() and (bool((index.diff() <= 0).any()) or index[0] < 0 or index[-1] >= linear.shape[1]):
        raise DeltaFormatError(f"{name}: salient channels must ascend within 0..{linear.shape[1] - 1}")
    for tensor in (packed.step, packed.salient_weight):
        if not bool(torch.isfinite(tensor).all()):
            raise DeltaFormatError(f"{name} holds NaN or infinity; fetch the delta again")


def _shards(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, tensor in tensors.items():
        if groups[-1] and held + tensor.nbytes > SHARD_BYTES:
            groups.append({})
            held = 0
        groups[-1][name] = tensor
        held += tensor.nbytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    stem = WEIGHTS.removesuffix(".safetensors")
    return {f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def card(delta: ExpertDelta, quality: str = "") -> str:
    """The card as Markdown, with the front matter that the hub reads."""
    manifest, config = delta.manifest, delta.manifest.config
    weights = sum(linear.shape[0] * linear.shape[1] for linear in manifest.modules.values())
    parts = delta.bytes_by_part()
    packed = delta.nbytes - parts["full"]
    lines = [
        "---",
        f"base_model: {json.dumps(manifest.base_model_name_or_path)}",
        "library_name: tersor",
        "tags: [me-switch, delta]",
        "---",
        "",
        f"# {Path(manifest.expert_model_name_or_path).name} as a delta",
        "",
        f"What {manifest.expert_model_name_or_path} adds to {manifest.base_model_name_or_path}: "
        f"{len(manifest.modules)} linears in {config.bits} bits ({config.grid} grid), {len(manifest.full)} tensors "
        f"complete, {len(manifest.same)} equal to the base's and not stored. Read it with `tersor.ExpertDelta`.",
        "",
        "| part | bytes |",
        "|---|---:|",
        *(f"| {name} | {size:,} |" for name, size in parts.items()),
        f"| all | {delta.nbytes:,} |",
        "",
    ]
    if weights:
        lines += [f"{8 * packed / weights:.2f} bits for each weight of these linears.", ""]
    return "\n".join([*lines, *([quality.rstrip(), ""] if quality else [])])
