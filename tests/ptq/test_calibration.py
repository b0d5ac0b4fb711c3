"""Calibration: better than its start, deterministic, resumable, and blind to nothing that the paper's loss sees."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from rep_models import W4, images, unruly, within_limits
from torch import nn

from tersor.ptq.calibration import quantize
from tersor.ptq.config import RepAPQConfig
from tersor.ptq.layers import integer_layers
from tersor.ptq.networks import KINDS
from tersor.ptq.stages import find_stages


def agreement(found: nn.Module, exact: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((found(x).argmax(1) == exact(x).argmax(1)).float().mean())


def test_the_whole_method_beats_its_start_and_that_beats_plain_ranges(net) -> None:
    calibration, held_out = images(192), images(512, seed=9)
    configs = {"minmax": W4.without_training("minmax"), "output": W4.without_training("output"), "RepAPQ": W4}
    scores = {
        name: agreement(quantize(net, calibration, config).model, net, held_out) for name, config in configs.items()
    }
    assert scores["minmax"] < scores["output"] - 0.1
    assert scores["output"] <= scores["RepAPQ"]


def test_eight_bits_are_nearly_the_network_and_sixteen_are(net) -> None:
    found = quantize(net, images(128), RepAPQConfig(iterations=20, init_images=64))
    assert agreement(found.model, net, images(512, seed=9)) > 0.95
    wide = quantize(net, images(64), RepAPQConfig.of("w16a16", iterations=0, weight_init="minmax", first_last_bits=16))
    x = images(64)  # those of the calibration, so that nothing is beyond a range
    noise = (wide.model(x) - net(x)).square().mean() / net(x).square().mean()
    assert noise < 1e-5, "50 dB"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_are_integers_within_their_bits(kind) -> None:
    found = quantize(unruly(kind), images(64), replace(W4, iterations=2))
    layers = integer_layers(found.model)
    assert all(within_limits(layer) for layer in layers.values())
    assert not any(isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) for module in found.model.modules())
    bits = [layer.weight_bits for layer in layers.values()]
    assert (bits[0], bits[-1], set(bits[1:-1])) == (8, 8, {4})


def test_the_same_seed_gives_the_same_integers(net) -> None:
    short = replace(W4, iterations=4)
    one, two, other = (quantize(net, images(64), each).model for each in (short, short, replace(short, seed=1)))
    states = [{name: value for name, value in each.state_dict().items()} for each in (one, two, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_an_interrupted_run_goes_on_after_the_last_stage(net, tmp_path) -> None:
    short, told = replace(W4, iterations=4), []

    def stop(text: str) -> None:
        told.append(text)
        if "stage 3" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(net, images(64), short, folder=tmp_path, on_progress=stop)
    assert len(list(tmp_path.glob("stage-*.safetensors"))) == 2
    resumed = quantize(net, images(64), short, folder=tmp_path)
    whole = quantize(net, images(64), short)
    assert resumed.blocks == whole.blocks
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(ValueError, match="another run"):
        quantize(net, images(64, seed=2), short, folder=tmp_path)
    with pytest.raises(ValueError, match="another run"):
        quantize(net, images(64).flip(0), short, folder=tmp_path)  # of equal sums
    other = copy.deepcopy(net)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(ValueError, match="another run"):
        quantize(other, images(64), short, folder=tmp_path)


def test_broken_files_of_a_run_are_named(net, tmp_path) -> None:
    short = replace(W4, iterations=0)
    quantize(net, images(8), short, folder=tmp_path)
    first, second = (tmp_path / f"stage-0{number}.safetensors" for number in (0, 1))
    whole = second.read_bytes()
    for content in (whole[:500], whole[:-9], b"", first.read_bytes()):
        second.write_bytes(content)
        with pytest.raises(ValueError, match=r"stage-01\.safetensors is no finished stage; remove it"):
            quantize(net, images(8), short, folder=tmp_path)
    second.write_bytes(whole)
    quantize(net, images(8), short, folder=tmp_path)
    for content in ("{", "[]", '"x"'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"run\.json|another run"):
            quantize(net, images(8), short, folder=tmp_path)


def test_switches_do_what_they_say(net) -> None:
    short = replace(W4, iterations=4)
    plain = quantize(net, images(64), replace(short, affine=False, train_weights=False))
    start = quantize(net, images(64), replace(short, iterations=0))
    for name, layer in integer_layers(plain.model).items():
        assert layer.weight.shape == integer_layers(start.model)[name].weight.shape
    assert any(
        not torch.equal(layer.w_scale, integer_layers(start.model)[name].w_scale)
        for name, layer in integer_layers(plain.model).items()
    )


def test_bad_input_is_refused_before_any_work(net) -> None:
    with pytest.raises(ValueError, match=r"\[n, channels, height, width\]"):
        quantize(net, images(4)[0])
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(net, images(4) / 0)
    with pytest.raises(ValueError, match="is no chain"):
        quantize(net, images(4), stages=[["stem"], ["stages.1.0"]])
    with pytest.raises(ValueError, match="is no chain"):
        find_stages(net, images(2), [["stem"], ["nothing"]])
    with pytest.raises(ValueError, match="is no chain"):
        find_stages(net, images(2), [["stem"]])
    for wrong, match in (
        ({"weight_bits": 1}, "weight_bits=1"), ({"weight_init": "best"}, "weight_init='best'"),
        ({"loss": "l3"}, "loss='l3'"), ({"iterations": -1}, "iterations=-1"), ({"scale_rate": -1.0}, "rates"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            RepAPQConfig(**wrong)
    with pytest.raises(ValueError, match="such as 'w8a8'"):
        RepAPQConfig.of("int8")
