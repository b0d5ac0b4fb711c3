"""Networks that are no chain are quantized end to end: every layer that can run in integers does, the rest is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pyramids import Pyramid, Shared, UNet, pair, settled
from rep_models import images
from torch import nn

from tersor.ptq.calibration import quantize
from tersor.ptq.config import RepAPQConfig
from tersor.ptq.layers import integer_layers
from tersor.ptq.onnx_export import export_float, export_quantized, session
from tersor.ptq.outputs import names_of, tensors_of
from tersor.ptq.speed import speedup, time_files
from tersor.ptq.tracing import trace

QUICK = RepAPQConfig(iterations=2, init_images=16)
NETWORKS: dict[str, tuple[Any, list[str]]] = {
    "a U-Net": (UNet, ["logits"]),
    "a pyramid by name": (Pyramid, ["p0", "p1", "p2"]),
    "a pyramid in a list": (lambda: Pyramid(named=False), ["output_0", "output_1", "output_2"]),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return settled(NETWORKS[name][0](), images(8))


@pytest.mark.parametrize("name", NETWORKS)
def test_they_run_in_integers_from_end_to_end(name: str, tmp_path: Any) -> None:
    x = images(16)
    found = quantize(built(name), x, QUICK)
    assert not found.plan.left and not found.plan.linked
    with torch.no_grad():
        wanted, ours = (list(tensors_of(each(x))) for each in (found.merged, found.model))
    assert len(ours) == len(NETWORKS[name][1])
    for one, other in zip(wanted, ours, strict=True):
        assert float((one - other).norm() / one.norm()) < 0.12
    file = export_quantized(found.model, x, tmp_path / "net.onnx")
    layers = sum(isinstance(each, nn.Conv2d) for each in found.merged.modules())
    assert file.float_layers == 0 and file.nodes["QLinearConv"] == layers == len(integer_layers(found.model))
    opened = session(file.path)
    assert [each.name for each in opened.get_outputs()] == NETWORKS[name][1]
    for simulated, ran in zip(ours, opened.run(None, {"input": x.numpy()}), strict=True):
        assert float((simulated - torch.from_numpy(ran)).abs().max()) < 0.06 * float(simulated.abs().max())


def test_chains_inside_are_found_and_outputs_that_others_read_are_rounded() -> None:
    plan = trace(quantize(built("a U-Net"), images(2), RepAPQConfig(iterations=0)).merged, images(2))
    assert [stage.blocks for stage in plan.stages] == [
        ("down1.0", "down1.1"), ("down2.0", "down2.1"), ("down3.0", "down3.1"), ("up2.0", "up2.1"),
        ("up1.0", "up1.1", "out"),
    ]  # fmt: skip
    assert plan.rounded == {"down1.1", "down2.1", "down3.1", "up2.1", "out"}


def test_what_only_a_relu_reads_is_rounded_as_it_leaves_the_relu() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.act = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU()

        def forward(self, x: Any) -> Any:
            y = self.act(self.one(x))
            return y + self.two(y)

    plan = trace(Plain().eval(), images(2))
    assert plan.rectified == {"one"} and plan.rounded == {"one", "two"}


def test_what_the_caller_gets_is_rounded_too(tmp_path: Any) -> None:
    """As a backbone gives an output of each stage, which the next stage reads as well."""

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = pair(3, 8), pair(8, 8, 2)

        def forward(self, x: Any) -> Any:
            one = self.one(x)
            return [one, self.two(one)]

    found = quantize(settled(Backbone(), images(8)), images(8), QUICK)
    assert found.plan.rounded == {"one.1", "two.1"}
    assert export_quantized(found.model, images(2), tmp_path / "net.onnx").float_layers == 0


def test_layers_that_are_shared_or_transposed_stay_as_they_are_and_are_named(tmp_path: Any) -> None:
    torch.manual_seed(0)
    told: list[str] = []
    found = quantize(settled(Shared(), images(8)), images(8), QUICK, on_progress=told.append)
    assert found.plan.left == ("head (used 2 times)", "up (ConvTranspose2d)")
    assert [each for each in told if "floating point" in each] == [
        "stays in floating point: head (used 2 times)", "stays in floating point: up (ConvTranspose2d)",
    ]  # fmt: skip
    assert len(integer_layers(found.model)) == 4
    file = export_quantized(found.model, images(2), tmp_path / "net.onnx")
    assert file.nodes["QLinearConv"] == 4


def test_an_interrupted_run_of_such_a_network_goes_on(tmp_path: Any) -> None:
    net = built("a pyramid by name")

    def stop(text: str) -> None:
        if "stage 4" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(net, images(16), QUICK, folder=tmp_path, on_progress=stop)
    resumed, whole = quantize(net, images(16), QUICK, folder=tmp_path), quantize(net, images(16), QUICK)
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_outputs_have_names_whatever_they_lie_in() -> None:
    x = torch.zeros(1)
    assert names_of(x) == ["logits"]
    assert names_of({"input": x, "boxes": [x, x]}) == ["output_input", "boxes_0", "boxes_1"]
    assert names_of((x, {"a": x})) == ["output_0", "output_1_a"]
    assert len(list(tensors_of([x, {"a": (x, 3)}, None]))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "side"), [(lambda: UNet((32, 64, 128)), 96), (lambda: Pyramid((64, 128, 256), 96), 128)]
)
def test_they_are_at_least_one_and_a_half_times_as_fast(build: Any, side: int, tmp_path: Any) -> None:
    """Processor time in turns; processors without VNNI gain less."""
    x = torch.randn(4, 3, side, side)
    found = quantize(settled(build(), x), x, RepAPQConfig().without_training("minmax"))
    files = export_float(found.merged, x, tmp_path / "a.onnx"), export_quantized(found.model, x, tmp_path / "b.onnx")
    assert speedup(time_files(*files, x[:1])).value >= 1.5
