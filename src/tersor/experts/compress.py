"""Make a delta: subtract, choose salient channels, quantize, pack; one linear in memory at a time."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tersor import _atomic
from tersor._errors import TersorError, UnsupportedError
from tersor._weights import save_tensors
from tersor.bench.measure import versions
from tersor.bench.runs import OnProgress
from tersor.experts.adapters import merged_adapter
from tersor.experts.architecture import check_same_architecture
from tersor.experts.calibration import Batches, input_energy
from tersor.experts.config import FLOATS, ConfigMismatchError, DeltaConfig
from tersor.experts.delta import PARTS, ExpertDelta, Linear, Manifest
from tersor.experts.distill import distill_closed_form, distill_codes
from tersor.experts.generation import own_settings
from tersor.experts.identity import Hashes, model_hash, tensor_hashes
from tersor.experts.quantizer import Grid, initial_step, robust_step
from tersor.experts.saliency import channel_scores, most_salient
from tersor.experts.sources import Anatomy, Source, batches, load_model, module_of
from tersor.lowbit.packing import pack_half_split
from tersor.training.claim import claim

#: Fewer tokens than this say little about activations.
FEW_TOKENS = 256


def compress_expert(
    base: Any,
    expert: Any,
    config: DeltaConfig | None = None,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    sequences: int = 128,
    length: int = 512,
    batch: int = 8,
    work: Path | None = None,
    on_progress: OnProgress = lambda doing: None,
) -> ExpertDelta:
    """What ``expert`` adds to ``base``, packed (ME-Switch, arXiv 2406.09041, section 3).

    Args:
        base: A model, or a folder or hub name with safetensors, which are read tensor by tensor.
        expert: The same, fine-tuned from ``base``, or a PEFT adapter of it, which is merged first. Only calibration and
            distillation load one that is a folder.
        config: Bits, channels and the rest; the paper's by default.
        calibration: Text of the expert's own domain: strings, rows with a "text", or tensors of ids. None scores
            channels by weights alone, which finds no outlier of activations.
        tokenizer: For strings; by default the one in the expert's folder.
        sequences: Texts of ``calibration`` that are read at most.
        length: Tokens that are read of each text at most.
        batch: Texts a forward pass.
        work: Folder where finished linears are kept, so that an interrupted run goes on there; remove it once the
            delta is saved.
        on_progress: Told what is being done.

    Raises:
        ConfigMismatchError: If the models differ in architecture or size.
        ValueError: If weights are not finite, or distillation has no calibration.
        NotImplementedError: If the model has routed experts whose weights are not stored complete.
    """
    settings = {"sequences": sequences, "length": length, "batch": batch}
    with Job.of(base, expert, config, calibration=calibration, tokenizer=tokenizer, **settings) as job:
        return job.run(work, on_progress)


@dataclass(frozen=True)
class Job:
    """Everything that one delta is made of, read and checked, before the work."""

    old: Source
    new: Source
    config: DeltaConfig
    before: Anatomy
    after: Anatomy
    base_tensors: Hashes
    identity: dict[str, Any]
    """Settings, and hashes of all numbers of base, expert and calibration data: jobs of one identity give one delta."""
    data: Batches | None
    model: Any
    """The expert where it is in memory, else its folder."""

    @classmethod
    @contextmanager
    def of(
        cls, base: Any, expert: Any, config: DeltaConfig | None, *, calibration: Any, tokenizer: Any = None,
        sequences: int = 128, length: int = 512, batch: int = 8,
    ) -> Iterator[Job]:  # fmt: skip
        """Arguments and errors are those of `compress_expert`."""
        config = config or DeltaConfig()
        if config.distill and calibration is None:
            raise TersorError(f"distill={config.distill!r} needs calibration data")
        expert = merged_adapter(base, expert)
        full = config.full_modules
        with Source(base, full_modules=full) as old, Source(expert, full_modules=full) as new:
            check_same_architecture(old.config, new.config)
            if old.architecture is not new.architecture:
                raise ConfigMismatchError(
                    f"base is {old.architecture.__name__}, expert {new.architecture.__name__}; load both as one class"
                )
            before, after = old.anatomy, new.anatomy
            for name, shape in after.routed.items():
                raise UnsupportedError(
                    f"{name} holds the weights of routed experts in one parameter {list(shape)}, whose deltas are not "
                    f"packed: name {module_of(name)[0].rpartition('.')[2]!r} in full_modules (--full-modules) to store "
                    "them complete"
                )
            for source, anatomy in ((old, before), (new, after)):
                source.check_shapes({**anatomy.linears, **anatomy.others})
                source.check_buffers()
            rows = {"sequences": sequences, "length": length, "batch": batch}
            data = None if calibration is None else _data(calibration, tokenizer, new.folder, **rows)
            # They read each tensor once, so that what is missing or not finite is found here, before the work.
            hashes, others = tensor_hashes(old), tensor_hashes(new)
            identity = {
                "config": config.to_dict(),
                "base": model_hash(hashes),
                "expert": model_hash(others),
                "calibration": None if data is None else _digest(data),
            }
            yield cls(old, new, config, before, after, hashes, identity, data, expert)

    def run(self, work: Path | None, on_progress: OnProgress) -> ExpertDelta:
        """Make the delta; ``work`` and ``on_progress`` as in `compress_expert`."""
        old, new, config, data = self.old, self.new, self.config, self.data
        modules = [module_of(name)[0] for name in self.after.linears]
        store = _Work(work, self.identity)
        model, energy = self._look(modules, on_progress)
        notes: list[str] = []
        tensors: dict[str, Tensor] = {}
        linears: dict[str, Linear] = {}
        same: list[str] = []
        for index, name in enumerate(self.after.linears):
            module = module_of(name)[0]
            on_progress(f"{module} ({index + 1} of {len(modules)})")
            one, other = old.read(name), new.read(name)
            if one.dtype != other.dtype and not notes:
                notes.append(f"base and expert were saved as {one.dtype} and {other.dtype}")
                warnings.warn(notes[0] + ": the difference in rounding becomes part of the delta", stacklevel=3)
            if torch.equal(one.float(), other.float()):
                same.append(name)
                continue
            linear, packed = store.remember(module, partial(_compress, one, other, config, energy.get(module), module))
            if linear.salient_dtype != config.salient_dtype:
                notes.append(f"{module}: salient channels exceed float16 and are {linear.salient_dtype}")
            linears[module] = linear
            tensors |= {f"{module}.{part}": tensor for part, tensor in packed.items()}
        full, tied = _complete(old, new, self.before, self.after, tensors, same)
        installed = versions()
        manifest = Manifest(
            base_model_name_or_path=old.name,
            base_revision=getattr(old.config, "_commit_hash", None),
            base_fingerprint=self.identity["base"],
            base_tensors=self.base_tensors,
            expert_fingerprint=self.identity["expert"],
            calibration=self.identity["calibration"],
            expert_model_name_or_path=new.name,
            architectures=[new.architecture.__name__],
            config=config,
            expert_config=json.loads(new.config.to_json_string(use_diff=False)),
            generation_config=own_settings(self.model, new.config, new.folder),
            modules=linears,
            full=full,
            same=sorted(same),
            tied=tied,
            notes=notes,
            versions={name: installed[name] for name in ("tersor", "torch", "transformers")},
        )
        delta = ExpertDelta(manifest, tensors, new.folder)
        if config.distill and data is not None:
            on_progress("distillation")
            if config.distill == "codes":
                delta = distill_codes(delta, old, model, data, on_progress=on_progress)
            else:
                delta = distill_closed_form(delta, old, model, data)
        return delta

    def _look(self, modules: list[str], on_progress: OnProgress) -> tuple[Any, dict[str, Tensor]]:
        """The expert and the energies of its linears' inputs, where there is calibration data."""
        if self.data is None:
            if self.config.selection == "reconstruction" and self.config.num_salient:
                warnings.warn(
                    "no calibration data: salient channels are chosen by weights alone, which finds none that only "
                    "activations make salient",
                    stacklevel=4,
                )
            return None, {}
        if self.new.config.is_encoder_decoder:
            raise UnsupportedError("models with an encoder and a decoder are packed without calibration; leave it out")
        on_progress("calibration")
        model = self.model if isinstance(self.model, nn.Module) else load_model(self.model)
        energy, tokens = input_energy(model, modules, self.data)
        if tokens < FEW_TOKENS:
            warnings.warn(f"only {tokens} calibration tokens; give at least {FEW_TOKENS}", stacklevel=4)
        return model, energy


def _compress(
    base: Tensor, expert: Tensor, config: DeltaConfig, energy: Tensor | None, name: str
) -> tuple[Linear, dict[str, Tensor]]:
    return compress_linear(expert.float() - base.float(), config, energy, name=name)


def compress_linear(
    delta: Tensor, config: DeltaConfig, energy: Tensor | None, *, name: str
) -> tuple[Linear, dict[str, Tensor]]:
    """Pack one float32 delta ``[out, in]``: steps on all of it, scores, channels, steps on the rest, codes.

    ``energy`` ``[in]``: ``sum_t x_ti^2``, or None for one everywhere.
    """
    grid = Grid(config.bits, config.midrise)
    dim = delta.shape[1]
    energy = torch.ones(dim) if energy is None else energy
    salient = torch.empty(0, dtype=torch.int64)
    k = config.salient_of(name, dim)
    step = initial_step(delta, grid, config.step_init)
    for number in range(config.selection_rounds if k else 0):
        # The longest delta of a row makes every other one look badly quantized: score with a robust step first.
        scoring = robust_step(delta) if config.step_init == "minmax" and number == 0 else step
        scores = channel_scores(config.selection, delta, grid.rounded(delta, scoring), energy, name=name)
        salient = most_salient(scores, k)
        rest = torch.ones(dim, dtype=torch.bool)
        rest[salient] = False
        step = initial_step(delta[:, rest], grid, config.step_init)
    step = _fitting(step, config.step_dtype, torch.float32)
    codes = grid.encode(delta, step.float())
    codes[:, salient] = grid.half
    kept = delta[:, salient] - grid.decode(codes[:, salient], step)
    kept = _fitting(kept, config.salient_dtype, torch.bfloat16)
    parts = (pack_half_split(codes, config.bits), step, salient.int(), kept)
    restored = grid.decode(codes, step)
    restored[:, salient] += parts[3].float()
    linear = Linear(
        shape=(delta.shape[0], dim),
        bits=config.bits,
        salient=len(salient),
        midrise=config.midrise,
        error=float((delta - restored).norm() / delta.norm()),
        salient_dtype=str(kept.dtype).removeprefix("torch."),
    )
    return linear, dict(zip(PARTS, parts, strict=True))


def _fitting(numbers: Tensor, dtype: str, wide: torch.dtype) -> Tensor:
    """``numbers`` as ``dtype``, or as ``wide`` where they exceed its range."""
    stored = numbers.to(FLOATS[dtype])
    return stored if bool(torch.isfinite(stored).all()) else numbers.to(wide)


def _complete(
    old: Source, new: Source, before: Anatomy, after: Anatomy, tensors: dict[str, Tensor], same: list[str]
) -> tuple[list[str], dict[str, str]]:
    """Store what is in no packed linear and differs from the base; returns its names and the expert's tied names."""
    full = []
    for name in after.others:
        ours = new.read(name)
        theirs = before.tied.get(name, name)
        # A head that only the base keeps apart must be stored: the expert's is tied to another tensor.
        known = theirs in before.others and not any(
            alias in before.others for alias, tied in after.tied.items() if tied == name
        )
        if known and (base := old.read(theirs)).shape == ours.shape and torch.equal(base.float(), ours.float()):
            same.append(name)
        else:
            tensors[name] = ours.clone()
            full.append(name)
    return full, {alias: name for alias, name in after.tied.items() if name in full}


def _data(calibration: Any, tokenizer: Any, folder: Path | None, *, sequences: int, length: int, batch: int) -> Batches:
    rows = [row for row, _ in zip(calibration, range(sequences), strict=False)]
    if rows and isinstance(rows[0], str | dict) and tokenizer is None and folder is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    data = list(batches(rows, tokenizer, length=length, size=batch))
    if not data:
        raise TersorError("the calibration data holds no token; pass calibration=None to choose by weights alone")
    return data


def _digest(data: Batches) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for batch in data for tensor in batch)).hexdigest()


class _Work:
    """Finished linears on disk, kept only while the same run (config, base, expert, calibration) goes on."""

    def __init__(self, folder: Path | None, identity: dict[str, Any]) -> None:
        self.folder = folder
        if folder is not None:
            claim(folder, identity)

    def remember(
        self, name: str, make: Callable[[], tuple[Linear, dict[str, Tensor]]]
    ) -> tuple[Linear, dict[str, Tensor]]:
        """What ``make`` gives, or what it gave in an earlier run."""
        if self.folder is None:
            return make()
        note, file = self.folder / f"{name}.json", self.folder / f"{name}.safetensors"
        if not note.is_file():
            linear, parts = make()
            save_tensors(file, parts)
            _atomic.write_text(note, json.dumps(vars(linear)))
        try:
            values = json.loads(note.read_text(encoding="utf-8"))
            return Linear(**{**values, "shape": tuple(values["shape"])}), load_file(file)
        except (ValueError, TypeError, KeyError, AttributeError, OSError, SafetensorError):
            raise TersorError(f"{note} and {file.name} are not whole; remove both, and they are made again") from None
