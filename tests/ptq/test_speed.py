"""Stages that stay in floating point: by name, or because the file would be slower than floating point."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pyramids import UNet, settled
from rep_models import images, unruly

from tersor.bench.measure import Estimate
from tersor.ptq import speed
from tersor.ptq.calibration import Quantized, quantize, without_integers
from tersor.ptq.config import RepAPQConfig
from tersor.ptq.layers import integer_layers
from tersor.ptq.onnx_export import OnnxFile, export_float, export_quantized
from tersor.ptq.speed import fast_enough, slower_stages, speedup, time_files

QUICK = RepAPQConfig(iterations=0, init_images=16)


@pytest.fixture(scope="module")
def found() -> Quantized:
    return quantize(unruly(), images(16), QUICK)


def test_a_stage_stays_as_it_is_and_the_others_run_in_integers(found: Quantized, tmp_path: Any) -> None:
    kept = without_integers(found, ["stages.1"], images(16), QUICK)
    assert set(integer_layers(found.model)) - set(integer_layers(kept.model)) == {
        f"stages.1.{number}.merged" for number in range(3)
    }
    file = export_quantized(kept.model, images(2), tmp_path / "net.onnx")
    assert file.float_layers == 3, "the stage before has a grid to write to"
    with torch.no_grad():
        exact = found.merged(images(16))
        errors = [float((each.model(images(16)) - exact).norm() / exact.norm()) for each in (found, kept)]
    assert errors[1] < errors[0] + 0.02
    assert len(integer_layers(found.model)) == 7, "what was given is not changed"


def test_a_network_that_is_no_chain_keeps_stages_too(tmp_path: Any) -> None:
    torch.manual_seed(0)
    net = quantize(settled(UNet(), images(8)), images(8), QUICK)
    kept = without_integers(net, ["down2.0"], images(8), QUICK)
    assert export_quantized(kept.model, images(2), tmp_path / "net.onnx").float_layers == 2


def test_stages_that_are_not_there_and_all_of_them_are_refused(found: Quantized) -> None:
    with pytest.raises(ValueError, match=r"no stage 'stages' to keep .* stem, stages\.0, stages\.1"):
        without_integers(found, ["stages"], images(2), QUICK)
    with pytest.raises(ValueError, match="no stage would be left"):
        without_integers(found, [stage.name for stage in found.plan.stages], images(2), QUICK)


def faked(monkeypatch: pytest.MonkeyPatch, ratios: dict[int, float]) -> None:
    """As if a file's speed depended on how many layers of it run in floating point."""

    def ratio(times: Any) -> Estimate:
        value = ratios[times]
        return Estimate(value, value - 0.01, value + 0.01, "95% bootstrap")

    monkeypatch.setattr(speed, "time_files", lambda exact, integer, *args, **kwargs: integer.float_layers)
    monkeypatch.setattr(speed, "speedup", ratio)


def test_a_slow_file_keeps_the_stages_that_are_slow(
    found: Quantized, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = export_float(found.merged, images(2), tmp_path / "float.onnx")
    written: list[OnnxFile] = []

    def write(what: Quantized) -> OnnxFile:
        written.append(export_quantized(what.model, images(2), tmp_path / "net.onnx"))
        return written[-1]

    faked(monkeypatch, {0: 0.5, 3: 1.2})
    monkeypatch.setattr(speed, "slower_stages", lambda *args: {"stages.1": 0.4})
    kept, file, names, value = fast_enough(found, exact, write, images(16), QUICK)
    assert (names, file.float_layers, value.value, len(written)) == (["stages.1"], 3, 1.2, 2)
    assert len(integer_layers(kept.model)) == 4
    faked(monkeypatch, {0: 1.5})
    kept, file, names, _ = fast_enough(found, exact, write, images(16), QUICK)
    assert kept is found and not names and file.float_layers == 0
    faked(monkeypatch, {0: 0.5, 6: 0.99})
    monkeypatch.setattr(speed, "slower_stages", lambda *args: {s.name: 0.1 for s in found.plan.stages})
    *_, names, _ = fast_enough(found, exact, write, images(16), QUICK)
    assert names == [stage.name for stage in found.plan.stages][:-1], "one stays in integers"


def test_stages_are_timed_alone(found: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def ratio(times: Any) -> Estimate:
        seen.append(times)
        return Estimate(0.1 * len(seen), 0, 1, "95% bootstrap")

    monkeypatch.setattr(speed, "speedup", ratio)
    monkeypatch.setattr(speed, "STAGE_ROUNDS", 1)
    slow = slower_stages(found, images(4), QUICK)
    assert list(slow) == [stage.name for stage in found.plan.stages]
    assert all({"floating point", "integers"} == set(times.samples) for times in seen)


def test_both_files_are_timed_in_turns(found: Quantized, tmp_path: Any) -> None:
    files = (
        export_float(found.merged, images(2), tmp_path / "a.onnx"),
        export_quantized(found.model, images(2), tmp_path / "b.onnx"),
    )
    value = speedup(time_files(*files, images(1), rounds=3))
    assert 0 < value.low <= value.value <= value.high
