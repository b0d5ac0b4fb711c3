"""The exported file: integers alone, the simulation's numbers, and honest about bits that no kernel has."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from rep_models import images, unruly
from torch import nn

from tersor.ptq import onnx_export
from tersor.ptq.calibration import Quantized, quantize
from tersor.ptq.config import RepAPQConfig
from tersor.ptq.layers import integer_layers
from tersor.ptq.networks import KINDS


@cache
def quantized(kind: str, bits: str) -> Quantized:
    return quantize(unruly(kind), images(64), RepAPQConfig.of(bits, iterations=3, init_images=64))


@pytest.fixture(scope="module", params=KINDS)
def eight(request, tmp_path_factory):
    """A network with 8 bits, and its file."""
    found = quantized(request.param, "w8a8")
    file = onnx_export.export_quantized(found.model, images(2), tmp_path_factory.mktemp("onnx") / "int8.onnx")
    return found, file


def test_no_layer_runs_in_floating_point(eight) -> None:
    found, file = eight
    layers = integer_layers(found.model)
    assert file.nodes["QLinearConv"] == len(layers) - 1 and file.nodes["QGemm"] == 1
    assert file.float_layers == 0 and not file.simulation
    # Merged, folded and fused: nothing is left between a convolution and the next.
    assert set(file.nodes) <= {
        "QLinearConv", "QGemm", "QuantizeLinear", "DequantizeLinear", "ReduceMean", "Transpose", "Reshape",
    }  # fmt: skip


def test_the_file_holds_the_integers_and_names_no_machine(eight) -> None:
    found, file = eight
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(file.path).graph.initializer}
    for name, layer in integer_layers(found.model).items():
        (weight,) = [value for key, value in stored.items() if key.replace("inner.", "") == f"{name}.weight"]
        assert weight.dtype == "int8" and torch.equal(torch.from_numpy(weight.copy()), layer.weight)
        (bias,) = [value for key, value in stored.items() if key.replace("inner.", "") == f"{name}.bias"]
        assert bias.dtype == "int32" and torch.equal(torch.from_numpy(bias.copy()), layer.bias)
    content = file.path.read_bytes()
    assert str(Path.cwd()).encode() not in content and b"tersor/ptq" not in content


def test_integer_kernels_give_the_simulations_numbers(eight) -> None:
    """Sums are the same integers; what is left is the order of one multiplication, which moves a rounding at most."""
    found, file = eight
    x = images(256, seed=9)
    with torch.no_grad():
        simulated = found.model(x)
    run = onnx_export.run(onnx_export.session(file.path), x)
    plain = onnx_export.run(onnx_export.session(file.path, optimize=False), x)
    step = max(float(layer.a_scale * layer.w_scale.max()) for layer in list(integer_layers(found.model).values())[-1:])
    same = (run == simulated).all(1).float().mean()
    assert same > 0.95, same
    # One step of the last layer's input in a few places.
    assert (run - simulated).abs().max() <= 127 * step
    for each in (run, plain):
        assert (each.argmax(1) == simulated.argmax(1)).float().mean() > 0.99
        assert (each - simulated).abs().mean() <= 1e-3 * simulated.std()


def test_a_layer_agrees_bit_for_bit(tmp_path) -> None:
    """One layer alone has no rounding after it: the sums are equal, and so is their product with the scales."""
    found = quantized("repvgg", "w8a8")
    layer = integer_layers(found.model)["head.fc"]

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = layer

        def forward(self, x):
            return self.fc(x.mean((2, 3)))

    x = torch.randn(64, 32, 4, 4, generator=torch.Generator().manual_seed(0)).relu()
    file = onnx_export.export_quantized(Alone(), x, tmp_path / "one.onnx")
    with torch.no_grad():
        assert torch.equal(onnx_export.run(onnx_export.session(file.path), x), Alone()(x))


@pytest.mark.parametrize(
    "bits", ["w4a4", pytest.param("w6a6", marks=pytest.mark.slow), pytest.param("w4a8", marks=pytest.mark.slow)]
)
def test_fewer_bits_are_simulated_exactly(bits, tmp_path) -> None:
    found = quantized("repvgg", bits)
    file = onnx_export.export_quantized(found.model, images(2), tmp_path / "low.onnx")
    assert file.simulation
    x = images(256, seed=9)
    with torch.no_grad():
        simulated = found.model(x)
    for optimize in (True, False):
        run = onnx_export.run(onnx_export.session(file.path, optimize=optimize), x)
        assert (run.argmax(1) == simulated.argmax(1)).float().mean() > 0.98
        assert ((run - simulated).abs().amax(1) < 1e-4).float().mean() > 0.9


def test_the_float_file_is_the_merged_network(tmp_path) -> None:
    found = quantized("repvgg", "w8a8")
    file = onnx_export.export_float(found.merged, images(2), tmp_path / "float.onnx")
    x = images(32, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(
            onnx_export.run(onnx_export.session(file.path), x), found.merged(x), rtol=1e-4, atol=1e-5
        )
    assert file.float_layers == len(integer_layers(found.model))


def test_what_cannot_be_exported_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="no integer layers"):
        onnx_export.export_quantized(unruly(), images(2), tmp_path / "x.onnx")
    wide = quantize(unruly(), images(8), RepAPQConfig.of("w16a16", iterations=0, weight_init="minmax"))
    with pytest.raises(ValueError, match="8 bits or fewer"):
        onnx_export.export_quantized(wide.model, images(2), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
