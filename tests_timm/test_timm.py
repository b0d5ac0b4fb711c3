"""Networks of timm, built without weights: merged, quantized, exported; or refused by name."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from tersor.cli import run
from tersor.ptq import onnx_export
from tersor.ptq.bench.peers import onnx_runtime
from tersor.ptq.bench.speed import SHAPES
from tersor.ptq.calibration import quantize
from tersor.ptq.config import RepAPQConfig
from tersor.ptq.images import load_timm
from tersor.ptq.networks import RepNet
from tersor.ptq.reparam import merge


def images(count: int, side: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def network(name: str) -> nn.Module:
    """With norms that have seen images, so that merging has something to do."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        model.train()(images(8))
    return model.eval()


def test_fastvit_keeps_some_layers_in_floating_point(tmp_path) -> None:
    """Its sums, gates and GELU stand between its convolutions, so that only some of those run in integers."""
    x = images(4)
    plain = RepAPQConfig(keep_float=()).without_training("minmax")
    found = quantize(network("fastvit_t8"), x, plain)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in found.model.modules())
    file = onnx_export.export_quantized(found.model, x, tmp_path / "int8.onnx")
    assert file.nodes["QLinearConv"] == 14 and file.float_layers == 38
    ran = onnx_export.run(onnx_export.session(file.path), x)
    with torch.no_grad():
        simulated = found.model(x)
    assert (ran - simulated).abs().max() <= 0.05 * simulated.abs().max()
    assert (ran - simulated).abs().mean() <= 0.01 * simulated.std()


def test_fastvit_is_left_as_it_is_where_integers_are_slower(tmp_path) -> None:
    """Which is everywhere but in its head; the plan names each stage and the reason."""
    x = images(2)
    found = quantize(network("fastvit_t8"), x, RepAPQConfig().without_training("minmax"))
    assert found.plan.kept == ("stem", "stages.0", "stages.1", "stages.2", "stages.3", "final_conv")
    assert found.plan.left[0] == "stage stem (most of its layers have no integer kernel)"
    file = onnx_export.export_quantized(found.model, x, tmp_path / "int8.onnx")
    assert file.nodes["Conv"] == 52 and file.nodes["QGemm"] == 1 and "QLinearConv" not in file.nodes
    for name in ("repvgg_a0", "mobileone_s0"):
        assert quantize(network(name), x, RepAPQConfig().without_training("minmax")).plan.kept == ()


def test_networks_that_are_no_chain_run_in_integers_where_they_can(tmp_path) -> None:
    """A RepViT, whose blocks add their inputs, and a backbone with an output of each stage."""
    plain = RepAPQConfig().without_training("minmax")
    x = images(2)
    found = quantize(network("repvit_m0_9"), x, plain)
    assert not found.plan.linked
    file = onnx_export.export_quantized(found.model, x, tmp_path / "repvit.onnx")
    assert file.float_layers == 0
    torch.manual_seed(0)
    backbone = timm.create_model("repvgg_a0", features_only=True).eval()
    found = quantize(backbone, x, plain)
    file = onnx_export.export_quantized(found.model, x, tmp_path / "features.onnx")
    opened = onnx_export.session(file.path)
    assert [each.name for each in opened.get_outputs()] == [f"output_{number}" for number in range(5)]
    shapes = [each.shape for each in opened.run(None, {"input": x.numpy()})]
    with torch.no_grad():
        assert shapes == [tuple(each.shape) for each in backbone(x)]
    assert file.float_layers == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobileone_s0", "mobileone_s1"])
def test_first_scales_are_as_near_to_floating_point_as_onnx_runtimes(name) -> None:
    """On 200 images of 96 x 96, paired: the ratio of error to signal of each, and which class is the likeliest."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    given = smooth(264)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(given[:32])
        model.eval()
        shown = given[64:]
        exact = model(shown)
        ours = quantize(model, given[:64], RepAPQConfig(iterations=0)).model(shown)
        theirs = onnx_runtime(model, given[:64])(shown)
    power = exact.square().sum(1)
    decibels = [10 * (power / (exact - each).square().sum(1)).log10() for each in (ours, theirs)]
    assert float((decibels[0] - decibels[1]).mean()) > 0
    agreement = [float((exact.argmax(1) == each.argmax(1)).float().mean()) for each in (ours, theirs)]
    assert agreement[0] >= agreement[1] - 0.01


def smooth(count: int, side: int = 96) -> torch.Tensor:
    """Noise with the spectrum of photographs."""
    spectrum = torch.fft.rfft2(torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1)))
    high, wide = torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None]
    found = torch.fft.irfft2(spectrum / (high**2 + wide**2).sqrt().clamp_min(1 / side), s=(side, side))
    return found / found.std((1, 2, 3), keepdim=True)


def test_what_cannot_be_merged_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"ResNet has no blocks with branches"):
        quantize(timm.create_model("resnet18").eval(), images(2))
    merged = timm.utils.reparameterize_model(timm.create_model("repvgg_a0").eval())
    with pytest.raises(ValueError, match="one convolution already"):
        quantize(merged, images(2))


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "mobileone_s1"])
def test_the_shapes_that_are_timed_are_timms(name) -> None:
    ours, theirs = RepNet(SHAPES[name]).eval(), timm.create_model(name).eval()
    merged = [merge(each, images(1)) for each in (ours, theirs)]
    shapes = [
        [
            (tuple(m.weight.shape), getattr(m, "stride", None))
            for m in each.modules()
            if isinstance(m, (nn.Conv2d, nn.Linear))
        ]
        for each in merged
    ]
    assert shapes[0] == shapes[1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "a0.pth"
    torch.save({"state_dict": network("repvgg_a0").state_dict()}, file)
    return file


def photographs(folder: Path, count: int, side: int = 256) -> Path:
    folder.mkdir()
    for index in range(count):
        pixels = (60 * images(1, side)[0].roll(index).permute(1, 2, 0) + 128).clamp(0, 255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def test_preprocessing_is_timms(weights, tmp_path) -> None:
    model, preprocessing = load_timm("repvgg_a0", weights)
    theirs = create_transform(**resolve_model_data_config(model), is_training=False)
    for size in ((300, 260), (257, 500)):
        picture = Image.effect_noise(size, 80).convert("RGB")
        assert torch.allclose(preprocessing(picture), theirs(picture), atol=1e-5)


def test_the_command_refuses_what_it_cannot_use(weights, tmp_path, capsys) -> None:
    folder = photographs(tmp_path / "photos", 2)
    merged = tmp_path / "merged.pth"
    torch.save(timm.utils.reparameterize_model(network("repvgg_a0")).state_dict(), merged)
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    small = photographs(tmp_path / "small", 1, side=100)

    def refused(model: str, file: Path, images: Path) -> str:
        out = tmp_path / "x.onnx"
        command = [
            "quantize",
            "--model",
            model,
            "--weights",
            str(file),
            "--calibration",
            str(images),
            "--out",
            str(out),
        ]
        assert run(command) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert "holds merged blocks" in refused("repvgg_a0", merged, folder)
    assert "does not hold the weights of mobileone_s0" in refused("mobileone_s0", weights, folder)
    assert "neither in the zoo nor a model of timm" in refused("repvgg_z9", weights, folder)
    assert "cannot be read" in refused("repvgg_a0", tmp_path / "broken.pth", folder)
    assert "is 100 x 100 pixels; the network takes 224 x 224" in refused("repvgg_a0", weights, small)


def test_the_command_quantizes_a_network_of_timm(weights, tmp_path, capsys) -> None:
    folder, out = photographs(tmp_path / "photos", 2), tmp_path / "a0.onnx"
    command = ["quantize", "--model", "repvgg_a0", "--weights", str(weights), "--calibration", str(folder)]
    assert run([*command, "--iterations", "1", "--json", "--out", str(out)]) == 0
    told = capsys.readouterr()
    facts = json.loads(told.out)
    assert "stage 6 of 6" in told.err
    assert facts["float_layers"] == 0 and facts["share_of_float"] <= 0.27 and not facts["simulation"]
    assert onnx_export.census(out)["QLinearConv"] == 22
    assert facts["bytes"] == out.stat().st_size and "<svg" in out.with_suffix(".html").read_text()
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith("a0")) == ["a0.html", "a0.onnx"]


def test_the_example_quantizes_mobileone(tmp_path, monkeypatch, capsys) -> None:
    folder, out = photographs(tmp_path / "photos", 2), tmp_path / "s0.onnx"
    made = network("mobileone_s0")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: made)
    options = [str(folder), str(out), "--model", "mobileone_s0", "--iterations", "0"]
    monkeypatch.setattr(sys, "argv", ["repapq_timm.py", *options])
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "repapq_timm.py"))
    told = capsys.readouterr().out
    assert "of 2 images are classified as in floating point" in told and "layers in floating point: 0" in told
    assert onnx_export.census(out)["QLinearConv"] == 43
    assert out.stat().st_size <= 0.27 * out.with_suffix(".float.onnx").stat().st_size


def checkpoints(tmp_path: Path, state: dict[str, torch.Tensor]) -> dict[str, object]:
    other = {name: each + 1 if each.is_floating_point() else each for name, each in state.items()}
    return {
        "training": {
            "state_dict": state,
            "epoch": 3,
            "args": argparse.Namespace(lr=0.1, model="x"),
            "metric": np.float64(1),
        },
        "averaged": {"state_dict": other, "state_dict_ema": state, "optimizer": {"param_groups": []}},
        "parallel": {f"module.{name}": each for name, each in state.items()},
        "compiled": {"model": {f"_orig_mod.module.{name}": each for name, each in state.items()}},
        "plain": state,
    }


def test_checkpoints_of_training_scripts_are_read_safely(tmp_path) -> None:
    state = network("mobileone_s0").state_dict()
    for name, content in checkpoints(tmp_path, state).items():
        torch.save(content, tmp_path / f"{name}.pth")
        read, _ = load_timm("mobileone_s0", tmp_path / f"{name}.pth")
        assert all(torch.equal(each, state[key]) for key, each in read.state_dict().items()), name
    torch.save({"state_dict": state, "hook": Path}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        load_timm("mobileone_s0", tmp_path / "code.pth")


def test_a_head_of_other_classes_is_built_as_the_weights_have_it(tmp_path) -> None:
    torch.manual_seed(0)
    for name in ("mobileone_s0", "repvgg_a0"):
        state = timm.create_model(name, num_classes=10).state_dict()
        save_file(state, tmp_path / "ten.safetensors")
        for classes in (None, 10):
            model, _ = load_timm(name, tmp_path / "ten.safetensors", classes)
            assert model(images(1)).shape == (1, 10)
        with pytest.raises(ValueError, match=r"--num-classes 7: .* head of 10 classes"):
            load_timm(name, tmp_path / "ten.safetensors", 7)
