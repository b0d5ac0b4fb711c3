"""Files for other importers: each is read back, looked at, and run beside the model that it was made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from rep_models import images, unruly

from tersor.ptq.calibration import Quantized, quantize
from tersor.ptq.config import RepAPQConfig
from tersor.ptq.layers import integer_layers
from tersor.ptq.onnx_export import OPSET, Target, export_quantized, session

QUICK = {"iterations": 0, "init_images": 16}


def quantized(**settings: Any) -> Quantized:
    return quantize(unruly(), images(16), RepAPQConfig(**QUICK, **settings))


def ran(file: Any, given: Any) -> torch.Tensor:
    opened = session(file.path)
    return torch.from_numpy(opened.run(None, {"input": given})[0])


def near(file: Any, found: Quantized, x: torch.Tensor) -> None:
    with torch.no_grad():
        wanted = found.model(x)
    assert float((ran(file, x.numpy()) - wanted).abs().max()) < 0.06 * float(wanted.abs().max())


def initializers(proto: Any) -> dict[str, np.ndarray]:
    return {each.name: numpy_helper.to_array(each) for each in proto.graph.initializer}


@pytest.fixture(scope="module")
def plain() -> Quantized:
    return quantized()


def test_symmetric_activations_have_zero_points_0(plain, tmp_path) -> None:
    found = quantized(symmetric=True)
    file = export_quantized(found.model, images(2), tmp_path / "net.onnx")
    proto = onnx.load(file.path)
    known = initializers(proto)
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            assert known[node.input[2]].dtype == np.int8 and not known[node.input[2]].any()
    near(file, found, images(4))
    with torch.no_grad():
        exact = found.merged(images(16))
        errors = [float((each.model(images(16)) - exact).norm() / exact.norm()) for each in (plain, found)]
    assert errors[1] < 3 * errors[0] + 0.05
    known = initializers(onnx.load(export_quantized(plain.model, images(2), tmp_path / "plain.onnx").path))
    assert any(each.dtype == np.uint8 for each in known.values())


@pytest.mark.parametrize("opset", [18, 19, OPSET, 23])
def test_the_operator_set_is_the_one_that_was_asked_for(opset, plain, tmp_path) -> None:
    file = export_quantized(plain.model, images(2), tmp_path / "net.onnx", Target(opset=opset))
    proto = onnx.load(file.path)
    assert [each.version for each in proto.opset_import if each.domain in ("", "ai.onnx")] == [opset]
    near(file, plain, images(4))
    assert file.float_layers == 0


def test_operator_sets_that_lack_what_is_needed_are_refused() -> None:
    for opset in (11, 17, 24):
        with pytest.raises(ValueError, match=f"opset={opset} must be from 18 to 23"):
            Target(opset=opset)


def test_a_reduced_range_has_weights_of_seven_bits_in_the_first_and_last_layer_too(tmp_path) -> None:
    found = quantized(reduce_range=True)
    assert max(int(layer.weight.abs().max()) for layer in integer_layers(found.model).values()) <= 63
    file = export_quantized(found.model, images(2), tmp_path / "net.onnx")
    weights = [each for each in initializers(onnx.load(file.path)).values() if each.dtype == np.int8 and each.ndim > 1]
    assert len(weights) == 7 and max(int(np.abs(each).max()) for each in weights) <= 63
    assert not file.simulation and file.float_layers == 0
    near(file, found, images(4))


def test_height_and_width_are_free_where_asked_for(plain, tmp_path) -> None:
    fixed = export_quantized(plain.model, images(2), tmp_path / "fixed.onnx")
    free = export_quantized(plain.model, images(2), tmp_path / "free.onnx", Target(free_size=True))
    sides = [[d.dim_param for d in onnx.load(f.path).graph.input[0].type.tensor_type.shape.dim] for f in (fixed, free)]
    assert not any(sides[0][1:]) and sides[1][2] and sides[1][3]
    wide = torch.randn(3, 3, 24, 40, generator=torch.Generator().manual_seed(5))
    near(free, plain, wide)
    with pytest.raises(Exception, match=r"INVALID_ARGUMENT|dimensions"):
        ran(fixed, wide.numpy())


def test_pictures_of_eight_bits_are_normalized_in_the_file(plain, tmp_path) -> None:
    normalize = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    file = export_quantized(plain.model, images(2), tmp_path / "net.onnx", Target(normalize=normalize))
    assert onnx.load(file.path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    mean, deviation = (torch.tensor(each)[:, None, None] for each in normalize)
    with torch.no_grad():
        wanted = plain.model((pixels / 255 - mean) / deviation)
    assert float((ran(file, pixels.numpy()) - wanted).abs().max()) < 0.06 * float(wanted.abs().max())
    assert file.float_layers == 0


def test_ignored_layers_stay_in_floating_point_by_name(plain, tmp_path) -> None:
    found = quantized(ignored=("head.fc", "stages.1.*"))
    kept = set(integer_layers(plain.model)) - set(integer_layers(found.model))
    assert kept == {name for name in integer_layers(plain.model) if name == "head.fc" or name.startswith("stages.1.")}
    file = export_quantized(found.model, images(2), tmp_path / "net.onnx")
    stored = initializers(onnx.load(file.path))
    assert sum(each.dtype == np.float32 and each.ndim > 1 for each in stored.values()) == len(kept)
    assert file.float_layers == len(kept) + 1  # the layer before them has no grid to write to
    near(file, found, images(4))
    assert set(found.plan.left) == {f"{name} (ignored)" for name in kept}
    with pytest.raises(ValueError, match=r"ignored names 'fc', which no layer has; there are stem\.merged"):
        quantized(ignored=("fc",))
    with pytest.raises(ValueError, match="leaves no layer"):
        quantized(ignored=("*",))
