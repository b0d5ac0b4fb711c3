"""Calibration of a network, stage by stage and block by block; finished stages are kept on disk."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tersor import _atomic
from tersor._errors import TersorError
from tersor.bench.measure import seed_of
from tersor.bench.runs import OnProgress
from tersor.ptq.blocks import CHUNK, Block, BlockReport, activation_scale, calibrate_block, run_chunks
from tersor.ptq.config import RepAPQConfig
from tersor.ptq.inputs import as_images
from tersor.ptq.layers import QuantLayer, RoundedInput, RoundedOutput
from tersor.ptq.quantizers import fake_activation
from tersor.ptq.reparam import merge
from tersor.ptq.rounding import LearnedRounding
from tersor.ptq.stages import Stage, find_stages
from tersor.ptq.tracing import Plan, float_stages, trace
from tersor.training.claim import claim

_REPORT = "report.json"


@dataclass(frozen=True)
class Quantized:
    """A calibrated model.

    Args:
        model: Integers alone; computes what an integer kernel does.
        merged: The floating-point model with one convolution a block.
        blocks: Reports, first to last.
        plan: The stages, and layers that stay in floating point.
    """

    model: nn.Module
    merged: nn.Module
    blocks: tuple[BlockReport, ...]
    plan: Plan


def quantize(
    model: nn.Module,
    calibration: Any,
    config: RepAPQConfig | None = None,
    *,
    stages: Sequence[Sequence[str]] | None = None,
    folder: str | Path | None = None,
    on_progress: OnProgress = lambda text: None,
) -> Quantized:
    """Merge, calibrate and freeze a copy of ``model``; no label is needed.

    Args:
        model: In training form, with branches; see `merge`.
        calibration: Images ``[n, channels, height, width]``, prepared as for the model; 256 to 1024 are usual. An
            array, a list, or a data loader's batches are taken as well, and uint8 pictures; see `as_images`.
        config: Bits, searches and training; the paper's by default.
        stages: Names of each stage's blocks; see `find_stages`.
        folder: Where finished stages are kept; a run that was interrupted goes on after the last of them.
        on_progress: Told what is being done.

    Raises:
        ValueError: Before any calibration, if images have a wrong shape or hold NaN, the model has no branches or is
            no chain of blocks, or ``folder`` belongs to another run.
    """
    config = config or RepAPQConfig()
    calibration = as_images(calibration, model, on_progress)
    if not bool(torch.isfinite(calibration).all()):
        raise TersorError("the calibration images hold NaN or infinity; check how they were normalized")
    merged = merge(model, calibration[:8]).requires_grad_(False)
    plan = find_plan(merged, calibration[:2], stages, config)
    chain = plan.stages
    for each in plan.left:
        on_progress(f"stays in floating point: {each}")
    bits = _bits_of_layers(merged, [stage for stage in chain if stage.name not in plan.kept], config)
    target = copy.deepcopy(merged)
    reports: list[BlockReport] = []
    kept = None if folder is None else Path(folder)
    if kept is not None:
        claim(
            kept,
            {
                "config": asdict(config),
                "images": _digest([calibration]),
                "weights": _digest(merged.state_dict().values()),
                "stages": [list(stage.blocks) for stage in chain],
            },
        )
    exact = rounded = calibration
    entry: tuple[Tensor, Tensor, int] | None = None
    for number, stage in enumerate(chain):
        on_progress(f"{stage.name}: stage {number + 1} of {len(chain)}")
        file = None if kept is None else kept / f"stage-{number:02}.safetensors"
        if not plan.linked:
            exact, rounded = (entering(each, stage.blocks[0], calibration) for each in (merged, target))
        elif number and number == len(chain) - 1:
            before_kept = chain[number - 1].name in plan.kept
            entry = None if before_kept else _entry(merged, stage, exact, bits, config)
            rounded = rounded if entry is None else fake_activation(rounded, *entry)
        _insert(target, stage, bits, config)
        for name in plan.rounded & set(stage.blocks):
            replace_module(target, name, _placeholder(target.get_submodule(name), config))
        if file is not None and file.is_file():
            reports += _restore(file, target, stage)
            for name in stage.blocks:
                exact, rounded = (
                    run_chunks(merged.get_submodule(name), exact),
                    run_chunks(target.get_submodule(name), rounded),
                )
            continue
        floats = [exact]
        for name in stage.blocks:
            floats.append(run_chunks(merged.get_submodule(name), floats[-1]))
        done = []
        for index, name in enumerate(stage.blocks):
            tail = [merged.get_submodule(each) for each in stage.blocks[index + 1 :]]
            wrapped = target.get_submodule(name)
            inner = wrapped.inner if isinstance(wrapped, RoundedOutput) else wrapped
            block = Block(name, inner, merged.get_submodule(name), tail)
            # A seed of its own for every block, so that a resumed run draws the same images.
            seed = seed_of(config.seed, 1_009 * number + index)
            done.append(calibrate_block(block, floats[index], rounded, floats[index + 1], floats[-1], config, seed))
            if isinstance(wrapped, RoundedOutput):
                reached = floats[index + 1].clamp(min=0) if name in plan.rectified else floats[index + 1]
                wrapped.settle(*activation_scale(reached, wrapped.bits, config))
            rounded = run_chunks(wrapped, rounded)
        exact = floats[-1]
        reports += done
        if file is not None:
            _keep(file, target, stage, done)
    for full, layer in list(target.named_modules()):
        if isinstance(layer, QuantLayer):
            replace_module(target, full, layer.freeze())
    if entry is not None:
        first = chain[-1].blocks[0]
        replace_module(target, first, RoundedInput(target.get_submodule(first), *entry))
    done_with = Quantized(target.eval(), merged, tuple(reports), plan)
    return without_integers(done_with, plan.kept, calibration, config) if plan.kept else done_with


def find_plan(model: nn.Module, example: Tensor, stages: Sequence[Sequence[str]] | None, config: RepAPQConfig) -> Plan:
    """The chain of a model, or the given one; where it is none, the chains inside it.

    Raises:
        ValueError: If ``stages`` are given and are no chain, the model has nothing to quantize, or an ignored layer is
            not there.
    """
    layers = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    ignored = [name for name in layers if is_ignored(name, config)]
    if unused := [each for each in config.ignored if not fnmatch.filter(layers, each)]:
        raise TersorError(f"ignored names {unused[0]!r}, which no layer has; there are {', '.join(layers)}")
    try:
        plan = Plan(find_stages(model, example, stages), left=tuple(f"{name} (ignored)" for name in ignored))
    except TersorError:
        if stages is not None:
            raise
        plan = trace(model, example, ignored)
    if not plan.stages:
        raise TersorError(f"{type(model).__name__} has no convolution or linear layer that is used once")
    names = [stage.name for stage in plan.stages]
    slow = config.keep_float
    if slow is None:
        slow = tuple(float_stages(model, example, plan.stages)) if plan.linked else ()
        slow = slow if set(names) > set(slow) else ()
    check_kept(slow, names)
    reason = "by keep_float" if config.keep_float else "most of its layers have no integer kernel"
    left = (*plan.left, *(f"stage {name} ({reason})" for name in slow))
    return replace(plan, kept=tuple(slow), left=left)


def check_kept(names: Sequence[str], known: Sequence[str]) -> None:
    """See that stages to keep in floating point are there, and not all of them.

    Raises:
        TersorError: Otherwise.
    """
    if unknown := sorted(set(names) - set(known)):
        raise TersorError(f"there is no stage {unknown[0]!r} to keep in floating point; there are {', '.join(known)}")
    if set(known) <= set(names):
        raise TersorError("no stage would be left to quantize; run the network in floating point")


def without_integers(found: Quantized, names: Sequence[str], images: Tensor, config: RepAPQConfig) -> Quantized:
    """The same model with whole stages in floating point; no other stage changes.

    Args:
        found: What `quantize` gave.
        names: Of stages, as ``found.plan.stages`` has them.
        images: Of calibration, for the grids at which the other stages end.
        config: As `quantize` had it.

    Raises:
        TersorError: If there is no such stage, or no other one.
    """
    check_kept(names, [stage.name for stage in found.plan.stages])
    model, before = copy.deepcopy(found.model), None
    for stage in found.plan.stages:
        if stage.name in names:
            for block in stage.blocks:
                replace_module(model, block, copy.deepcopy(found.merged.get_submodule(block)))
            if found.plan.linked and before is not None and before not in names:
                first = stage.blocks[0]
                grid = activation_scale(entering(found.merged, first, images[:CHUNK]), 8, config)
                replace_module(model, first, RoundedInput(model.get_submodule(first), *grid, 8))
        elif before in names and isinstance(head := model.get_submodule(stage.blocks[0]), RoundedInput):
            replace_module(model, stage.blocks[0], head.inner)  # nothing before it needs a grid
        before = stage.name
    return Quantized(model, found.merged, found.blocks, found.plan)


def is_ignored(name: str, config: RepAPQConfig) -> bool:
    """Whether a layer stays in floating point by its name."""
    return any(fnmatch.fnmatchcase(name, each) for each in config.ignored)


class _Entered(Exception):
    """Ends a run at the module whose input was asked for."""


@torch.no_grad()
def entering(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """What the module ``name`` is given when the model reads ``x``."""
    given: list[Tensor] = []

    def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given.append(inputs[0])
        raise _Entered

    hook = model.get_submodule(name).register_forward_pre_hook(take)
    for part in torch.split(x, CHUNK):
        with contextlib.suppress(_Entered):
            model(part)
    hook.remove()
    return torch.cat(given)


def _placeholder(block: nn.Module, config: RepAPQConfig) -> RoundedOutput:
    one = next(block.parameters()).new_ones(())
    return RoundedOutput(block, one, one * 0, max(config.activation_bits, config.first_last_bits))


def _entry(
    merged: nn.Module, stage: Stage, x: Tensor, bits: dict[str, tuple[int, int]], config: RepAPQConfig
) -> tuple[Tensor, Tensor, int] | None:
    """Grid for what enters the last stage, ``x`` in floating point; None if a layer that rounds comes first there."""
    first = stage.blocks[0]
    layer = next(each for each in merged.get_submodule(first).modules() if isinstance(each, (nn.Conv2d, nn.Linear)))
    given: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    run_chunks(merged.get_submodule(first), x[:1])
    hook.remove()
    if given[0].shape == x[:1].shape and torch.equal(given[0], x[:1]):
        return None
    width = list(bits.values())[-1][1]
    return (*activation_scale(x, width, config), width)


def _bits_of_layers(model: nn.Module, chain: list[Stage], config: RepAPQConfig) -> dict[str, tuple[int, int]]:
    """Bits of weights and activations by layer, in the order in which the chain has them."""
    names = [
        f"{block}.{name}" if name else block
        for stage in chain
        for block in stage.blocks
        for name, layer in model.get_submodule(block).named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    names = [name for name in names if not is_ignored(name, config)]
    if not names:
        raise TersorError(f"ignored={config.ignored} leaves no layer to quantize")
    found = dict.fromkeys(names, (config.weight_bits, config.activation_bits))
    for end in (names[0], names[-1]):
        found[end] = (
            max(config.weight_bits, config.first_last_bits),
            max(config.activation_bits, config.first_last_bits),
        )
    if config.reduce_range:
        found = {name: (min(weight, 7), activation) for name, (weight, activation) in found.items()}
    return found


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put another module where ``model`` has one of that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _insert(model: nn.Module, stage: Stage, bits: dict[str, tuple[int, int]], config: RepAPQConfig) -> None:
    """Put quantized layers into a stage; their scales are placeholders."""
    for block in stage.blocks:
        for name, layer in list(model.get_submodule(block).named_modules()):
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                full = f"{block}.{name}" if name else block
                if full not in bits:
                    continue
                weight_bits, activation_bits = bits[full]
                one = layer.weight.new_ones(())
                kind = LearnedRounding if config.rounding == "learned" else QuantLayer
                new = kind(
                    layer, weight_bits=weight_bits, activation_bits=activation_bits,
                    w_scale=one.expand(len(layer.weight)), a_scale=one, a_zero=one * 0,
                )  # fmt: skip
                replace_module(model, full, new)


def _keep(file: Path, model: nn.Module, stage: Stage, reports: list[BlockReport]) -> None:
    """Write a stage's parameters with its reports, as one file."""
    told = json.dumps([asdict(report) for report in reports])
    _atomic.write_bytes(file, save(_state_of(model, stage), metadata={_REPORT: told}))


def _state_of(model: nn.Module, stage: Stage) -> dict[str, Tensor]:
    return {
        name: value.contiguous()
        for name, value in model.state_dict().items()
        if any(name.startswith(f"{block}.") for block in stage.blocks)
    }


def _restore(file: Path, model: nn.Module, stage: Stage) -> list[BlockReport]:
    """Put a finished stage's parameters into ``model``; returns its reports.

    Raises:
        TersorError: If the file is not whole.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            told = opened.metadata()[_REPORT]
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
        if state.keys() != _state_of(model, stage).keys():
            raise KeyError("other tensors")
        model.load_state_dict(state, strict=False)
        return [BlockReport(**each) for each in json.loads(told)]
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError):
        raise TersorError(f"{file} is no finished stage; remove it, and the stage is calibrated again") from None


def _digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
