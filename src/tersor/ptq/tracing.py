"""What a network computes in which order: the units that can run in integers, and who reads their outputs.

A unit is a convolution or a linear layer, with the ReLU after it where a block has both. Networks that are no chain,
because of skips, several outputs or gates, are quantized unit by unit; units that read nothing but each other's output
are a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tersor.ptq.outputs import tensors_of
from tersor.ptq.stages import Stage

Layer = (nn.Conv2d, nn.Linear)
#: Weights that no integer kernel takes; they stay in floating point, and are named.
_OTHERS = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.RNNBase)
_RELU = ("relu", "relu_")
_PRODUCTS = ("conv2d", "linear", "_conv_forward")


@dataclass
class _Call:
    """One call of a module: what it got, what it gave, and what was computed in between."""

    name: str
    module: nn.Module
    given: int | None
    out: int = 0
    operations: list[str] = field(default_factory=list)


class _Watch(TorchFunctionMode):
    """Every operation, with the tensors that it reads; these are kept, so that no address is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[_Call] = []
        self.calls: list[_Call] = []
        self.readers: dict[int, list[str]] = {}
        self.kept: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        result = function(*args, **(kwargs or {}))
        if name == "__get__" or name in ("size", "dim", "numel", "is_floating_point"):
            return result
        for call in self.running:
            call.operations.append(name)
        for each in tensors_of([args, kwargs]):
            self.readers.setdefault(id(each), []).append(name)
            self.kept.append(each)
        self.kept.append(result)
        return result

    def enter(self, name: str, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        one = len(inputs) == 1 and isinstance(inputs[0], Tensor) and not kwargs
        self.kept.append(inputs)
        self.running.append(_Call(name, module, id(inputs[0]) if one else None))

    def leave(self, output: Any) -> None:
        call = self.running.pop()
        self.kept.append(output)
        call.out = id(output)
        self.calls.append(call)


@dataclass(frozen=True)
class Plan:
    """How a network is quantized.

    Args:
        stages: What is calibrated, in the order of the computation.
        linked: Whether each stage reads what the one before gives; else its input is taken from the whole network.
        rounded: Blocks whose output is rounded, because others than the next block read it.
        rectified: Those of them whose output only a ReLU reads.
        left: Layers that stay in floating point, each with the reason.
        kept: Stages that stay in floating point.
    """

    stages: list[Stage]
    linked: bool = True
    rounded: frozenset[str] = frozenset()
    rectified: frozenset[str] = frozenset()
    left: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


@torch.no_grad()
def trace(model: nn.Module, example: Tensor, ignored: Sequence[str] = ()) -> Plan:
    """Run ``model`` once and find its units, the stages that they make, and what stays in floating point.

    Args:
        model: With one convolution a block.
        example: Images that it takes.
        ignored: Layers that shall stay in floating point.
    """
    watch = _watched(model, example)
    units, left = _units(watch.calls, ignored)
    rounded, rectified = set(), set()
    stages: list[list[_Call]] = []
    for place, unit in enumerate(units):
        readers = watch.readers.get(unit.out, [])
        following = units[place + 1] if place + 1 < len(units) else None
        alone = following is not None and following.given == unit.out and len(readers) == 1
        if not alone and not isinstance(unit.module, nn.Linear):
            rounded.add(unit.name)
            if readers and all(reader in _RELU for reader in readers):
                rectified.add(unit.name)
        previous = units[place - 1] if place else None
        joined = previous is not None and previous.given is not None and previous.name not in rounded
        if joined and stages and unit.given == stages[-1][-1].out:
            stages[-1].append(unit)
        else:
            stages.append([unit])
    found = [Stage(stage[0].name, tuple(call.name for call in stage)) for stage in stages]
    return Plan(found, False, frozenset(rounded), frozenset(rectified), tuple(left))


@torch.no_grad()
def float_stages(model: nn.Module, example: Tensor, chain: Sequence[Stage]) -> list[str]:
    """Stages of a chain most of whose layers would run in floating point although they are quantized.

    An integer kernel writes integers, so that only layers may read its output, or the next block. A sum, a gate or a
    GELU that reads it costs the kernel, and the way to integers and back on top.
    """
    watch = _watched(model, example)
    blocks = {block for stage in chain for block in stage.blocks}
    ends = {call.out for call in watch.calls if call.name in blocks}
    units = _units(watch.calls, ())[0]
    given = {unit.given for unit in units}

    def runs(unit: _Call) -> bool:
        alone = len(watch.readers.get(unit.out, [])) == 1 and (unit.out in given or unit.out in ends)
        return alone or isinstance(unit.module, nn.Linear)

    found = []
    for stage in chain:
        own = [runs(unit) for unit in units if any(f"{unit.name}.".startswith(f"{block}.") for block in stage.blocks)]
        if own and sum(own) < len(own) / 2:
            found.append(stage.name)
    return found


def _watched(model: nn.Module, example: Tensor) -> _Watch:
    """Run ``model`` once under a watch."""
    watch = _Watch()
    hooks = []
    for name, module in model.named_modules():
        hooks.append(
            module.register_forward_pre_hook(
                lambda module, inputs, kwargs, name=name: watch.enter(name, module, inputs, kwargs), with_kwargs=True
            )
        )
        hooks.append(module.register_forward_hook(lambda module, inputs, output: watch.leave(output)))
    try:
        with watch:
            given = model(example)
    finally:
        for hook in hooks:
            hook.remove()
    for each in tensors_of(given):
        watch.readers.setdefault(id(each), []).append("output")
    return watch


def _units(calls: list[_Call], ignored: Sequence[str]) -> tuple[list[_Call], list[str]]:
    """Calls of units in their order, and the layers that are in none."""
    by_name: dict[str, list[_Call]] = {}
    for call in calls:
        by_name.setdefault(call.name, []).append(call)
    units, left = [], []
    for call in calls:
        if isinstance(call.module, _OTHERS):
            left.append(f"{call.name} ({type(call.module).__name__})")
        if not isinstance(call.module, Layer):
            continue
        if call.name in ignored:
            left.append(f"{call.name} (ignored)")
            continue
        if len(by_name[call.name]) > 1:
            left.append(f"{call.name} (used {len(by_name[call.name])} times)")
            continue
        parts = call.name.split(".")
        around = [".".join(parts[:length]) for length in range(1, len(parts))]
        wider = (by_name[name][0] for name in around if len(by_name.get(name, ())) == 1)
        units.append(next((each for each in wider if _is_unit(each, call)), call))
    return units, list(dict.fromkeys(left))


def _is_unit(around: _Call, layer: _Call) -> bool:
    """Whether a module is this layer and at most a ReLU."""
    rest = [name for name in around.operations if name not in _RELU]
    return around.given == layer.given and rest == layer.operations
