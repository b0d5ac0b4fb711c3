"""A quantized model as an ONNX file of integers, with QuantizeLinear and DequantizeLinear; and what a file runs as."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor import _atomic
from tersor._errors import TersorError
from tersor._lazy import require
from tersor.ptq.layers import IntegerLayer, RoundedInput, RoundedOutput
from tersor.ptq.outputs import names_of

#: The first operator set with 4-bit integers and with what torch's exporter writes.
OPSET = 21
#: Images that a session computes at once.
_BATCH = 100


@dataclass(frozen=True)
class OnnxFile:
    """What an exported file holds.

    Args:
        nbytes: Size of the file.
        nodes: Operators and how many of each, as ONNX Runtime runs them on a CPU.
        simulation: Whether some layer has fewer than 8 bits: the figures are those of the bits, the speed is not.
    """

    path: Path
    nbytes: int
    nodes: dict[str, int]
    simulation: bool

    @property
    def float_layers(self) -> int:
        """Convolutions and products that run in floating point."""
        return sum(
            self.nodes.get(name, 0) for name in ("Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul")
        )


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the file is for.

    Args:
        opset: ONNX operator set, from 18 to 23; importers such as TensorRT's know up to some.
        free_size: Whether height and width are free in the file, not the batch alone.
        normalize: Mean and deviation of each channel; the file then takes uint8 pictures, channels first, and
            normalizes them itself.
    """

    opset: int = OPSET
    free_size: bool = False
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __post_init__(self) -> None:
        if self.opset not in range(18, 24):
            raise TersorError(f"opset={self.opset} must be from 18 to 23")


def export_quantized(
    model: nn.Module, example: Tensor, path: str | os.PathLike[str], target: Target | None = None
) -> OnnxFile:
    """Write the integers of `quantize`'s model.

    Weights are int8, biases int32 on the grid of the products, and a layer's input goes through QuantizeLinear to
    uint8. With fewer than 8 bits a Clip before it leaves only the integers that there are, and the file is a
    simulation: it gives the numbers of such hardware, at no gain over 8 bits; after a Clip convolutions run in
    floating point.

    Args:
        example: Images ``[n, channels, height, width]``; the batch is free in the file.
        path: Where the file goes; it appears when it is whole.
        target: Operator set, free sizes and kind of input.

    Raises:
        ValueError: If the model has no integer layers, or one of more than 8 bits.
        RuntimeError: If torch cannot export the model's own operations.
    """
    layers = [each for each in model.modules() if isinstance(each, IntegerLayer)]
    if not layers:
        raise TersorError(f"{type(model).__name__} has no integer layers; give the model that quantize() returns")
    if max(max(each.weight_bits, each.activation_bits) for each in layers) > 8:
        raise TersorError("ONNX Runtime's kernels take integers of 8 bits; quantize with 8 bits or fewer to export")
    target = target or Target()
    ready = copy.deepcopy(model).eval()
    # With zero in the middle of every grid, int8 with zero points 0 are the same integers.
    grids: list[tuple[Any, int]] = [(each.a_zero, each.activation_bits) for each in layers]
    grids += [(each.zero, each.bits) for each in model.modules() if isinstance(each, RoundedInput | RoundedOutput)]
    signed = all(int(zero) == 2 ** (bits - 1) for zero, bits in grids)
    for name, module in list(ready.named_modules()):
        if isinstance(module, IntegerLayer):
            parent, _, child = name.rpartition(".")
            setattr(ready.get_submodule(parent), child, _Layer(module, target.opset, signed))
        elif isinstance(module, RoundedInput | RoundedOutput):
            # The block below it is replaced in place, since the walk goes on below it.
            parent, _, child = name.rpartition(".")
            kind = _Entry if isinstance(module, RoundedInput) else _Exit
            shown = kind(_grid_of(module, target.opset, signed), module.inner)
            setattr(ready.get_submodule(parent), child, shown)
    _write(ready, example, Path(path), _names(model, example), target)
    low = any(each.activation_bits < 8 or each.weight_bits < 7 for each in layers)
    return OnnxFile(Path(path), Path(path).stat().st_size, census(path), low)


def export_float(
    model: nn.Module, example: Tensor, path: str | os.PathLike[str], target: Target | None = None
) -> OnnxFile:
    """Write a floating-point model; arguments as of `export_quantized`."""
    _write(copy.deepcopy(model).eval(), example, Path(path), _names(model, example), target or Target())
    return OnnxFile(Path(path), Path(path).stat().st_size, census(path), False)


def _symbolic(
    operator: str, inputs: tuple[Tensor, ...], like: Tensor, dtype: torch.dtype, opset: int, **attributes: int
) -> Tensor:
    """A node of ONNX with the shape of ``like``; only the exporter computes it."""
    out: Tensor = torch.onnx.ops.symbolic(
        operator, inputs, attrs={**attributes}, dtype=dtype, shape=like.shape, version=opset
    )
    return out


class _Grid(nn.Module):
    """A tensor through uint8 and back, or through int8 where zero is in the middle."""

    def __init__(self, scale: Tensor, zero: Tensor, bits: int, opset: int, signed: bool) -> None:
        super().__init__()
        self.opset, self.dtype = opset, torch.int8 if signed else torch.uint8
        self.scale: Tensor
        self.zero: Tensor
        self.register_buffer("scale", scale)
        self.register_buffer("zero", (zero - 2 ** (bits - 1) * signed).to(self.dtype))
        # Where fewer integers exist than uint8 has, values beyond them must not get one.
        ends = (-float(zero) * float(scale), (2**bits - 1 - float(zero)) * float(scale))
        self.ends = ends if bits < 8 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.ends is not None:
            x = x.clamp(*self.ends)
        integers = _symbolic("QuantizeLinear", (x, self.scale, self.zero), x, self.dtype, self.opset)
        return _symbolic("DequantizeLinear", (integers, self.scale, self.zero), x, torch.float32, self.opset)


class _Layer(nn.Module):
    """An integer layer as ONNX has it; names of its tensors become those of the file."""

    def __init__(self, source: IntegerLayer, opset: int, signed: bool) -> None:
        super().__init__()
        self.opset = opset
        self._shape = [source.layer]
        self.weight: Tensor
        self.weight_scale: Tensor
        self.weight_zero: Tensor
        self.bias: Tensor
        self.bias_scale: Tensor
        self.grid = _Grid(source.a_scale, source.a_zero, source.activation_bits, opset, signed)
        for name, value in (
            ("weight", source.weight), ("weight_scale", source.w_scale),
            ("weight_zero", torch.zeros_like(source.bias, dtype=torch.int8)), ("bias", source.bias),
            ("bias_scale", source.a_scale * source.w_scale),
        ):  # fmt: skip
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self._shape[0]
        if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        x = self.grid(x)
        weight = self._values((self.weight, self.weight_scale, self.weight_zero))
        bias = self._values((self.bias, self.bias_scale))
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        padding = layer.padding if layer.padding_mode == "zeros" else 0
        return F.conv2d(x, weight, bias, layer.stride, padding, layer.dilation, layer.groups)

    def _values(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """What integers stand for, row by row: they, their scales, and zero points where a kernel asks for them."""
        return _symbolic("DequantizeLinear", inputs, inputs[0], torch.float32, self.opset, axis=0)


def _grid_of(source: RoundedInput | RoundedOutput, opset: int, signed: bool) -> _Grid:
    return _Grid(source.scale, source.zero, source.bits, opset, signed)


class _Entry(nn.Module):
    def __init__(self, grid: _Grid, inner: nn.Module) -> None:
        super().__init__()
        self.grid, self.inner = grid, inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(self.grid(x))


class _Exit(_Entry):
    def forward(self, x: Tensor) -> Any:
        return self.grid(self.inner(x))


@torch.no_grad()
def _names(model: nn.Module, example: Tensor) -> list[str]:
    return names_of(model(example[:1]))


class _Pictures(nn.Module):
    """A network that normalizes uint8 pictures itself."""

    def __init__(self, inner: nn.Module, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        self.inner = inner
        self.factor: Tensor
        self.shift: Tensor
        mean_, deviation_ = (torch.tensor(each)[:, None, None] for each in (mean, deviation))
        self.register_buffer("factor", 1 / (255 * deviation_))
        self.register_buffer("shift", mean_ / deviation_)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x.float() * self.factor - self.shift)


def _write(model: nn.Module, example: Tensor, path: Path, names: list[str], target: Target) -> None:
    """Export with a free batch, check, and put the file in its place."""
    onnx: Any = require("onnx", "ptq")
    require("onnxscript", "ptq")
    free: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=65_536)}
    if target.free_size:
        free |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    # Two images: one would fix the batch.
    given = example[:1].repeat(2, 1, 1, 1)
    if target.normalize is not None:
        model, given = _Pictures(model, *target.normalize), torch.zeros_like(given, dtype=torch.uint8)
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                model, (given,), dynamo=True, opset_version=target.opset, dynamic_shapes=(free,), input_names=["input"],
                output_names=names, verbose=False,
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(f"torch cannot export {type(model).__name__}: {reason}") from error
    proto = program.model_proto
    sides = proto.graph.input[0].type.tensor_type.shape.dim
    for place, what in enumerate(("size of its batch", "channels", "height", "width")):
        if place in free and not sides[place].dim_param:
            raise TersorError(f"{type(model).__name__} fixes the {what}, so that the file would take no other")
    for part in (proto.graph, *proto.graph.node, *proto.graph.input):
        part.ClearField("metadata_props")  # source lines with the paths of this machine
    proto.graph.ClearField("value_info")  # shapes between the nodes, which runtimes infer
    onnx.checker.check_model(proto)
    _atomic.write_bytes(path, proto.SerializeToString())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own workings."""
    loud = logging.getLogger("torch.onnx")
    level = loud.level
    loud.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        loud.setLevel(level)


def census(path: str | os.PathLike[str]) -> dict[str, int]:
    """Operators of a file by count, after ONNX Runtime has optimized it for a CPU."""
    onnx: Any = require("onnx", "ptq")
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session(path, optimized=optimized)
        nodes = onnx.load(optimized).graph.node
    return dict(Counter(node.op_type for node in nodes).most_common())


def session(
    path: str | os.PathLike[str], *, optimize: bool = True, threads: int = 1, optimized: Path | None = None
) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        optimize: False runs the nodes of the file as they are.
        optimized: File to write what is run to.
    """
    runtime: Any = require("onnxruntime", "ptq")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if not optimize:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(opened: Any, images: Tensor) -> Tensor:
    """Outputs ``[n, classes]`` of a `session` for images ``[n, channels, height, width]``."""
    parts = [opened.run(None, {opened.get_inputs()[0].name: part.numpy()})[0] for part in torch.split(images, _BATCH)]
    return torch.from_numpy(np.concatenate(parts))
