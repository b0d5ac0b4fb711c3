"""Other libraries' quantizers, at their defaults for convolutional networks: what users would pick instead."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor._lazy import MissingExtraError, installed, require
from tersor.ptq.onnx_export import export_float, run, session
from tersor.ptq.reparam import merge

#: Images that a quantizer is given at once.
_BATCH = 64


def onnx_runtime(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """ONNX Runtime's static quantization: ranges from least to largest, a scale for each row of weights."""
    quantization: Any = require("onnxruntime.quantization", "ptq")
    batches = iter([{"input": part.numpy()} for part in torch.split(images, _BATCH)])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(batches, None)

    def write(exact: Path, file: Path) -> None:
        logging.disable(logging.WARNING)  # it recommends folding, and there is nothing left to fold
        try:
            quantization.quantize_static(
                str(exact), str(file), Reader(), per_channel=True, quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            )  # fmt: skip
        finally:
            logging.disable(logging.NOTSET)

    return _from_file(model, images, write)


def has_nncf() -> bool:
    """Whether NNCF is installed."""
    return installed("nncf")


def nncf(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """NNCF's quantization of ONNX files, with its own correction of biases.

    Raises:
        MissingExtraError: without NNCF, which no extra brings, since it fixes many versions.
    """
    if not has_nncf():
        raise MissingExtraError("NNCF is missing: pip install nncf")
    library: Any = importlib.import_module("nncf")
    onnx: Any = require("onnx", "ptq")

    def write(exact: Path, file: Path) -> None:
        parts = [{"input": part.numpy()} for part in torch.split(images, _BATCH)]
        with contextlib.redirect_stdout(sys.stderr):  # its progress bars
            found = library.quantize(onnx.load(exact), library.Dataset(parts), subset_size=len(parts))
        onnx.save(found, file)

    return _from_file(model, images, write)


def _from_file(model: nn.Module, images: Tensor, write: Callable[[Path, Path], None]) -> Callable[[Tensor], Tensor]:
    """Merge, export, have ``write`` quantize the file, and run that."""
    with tempfile.TemporaryDirectory() as folder:
        exact, file = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        export_float(merge(model, images[:8]), images, exact)
        write(exact, file)
        opened = session(file)
    return lambda given: run(opened, given)
