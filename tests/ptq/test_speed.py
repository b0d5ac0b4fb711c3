"""Stages that stay in floating point: by name, or because the file would be slower than floating point."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
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


def estimate(value: float, spread: float = 0.01) -> Estimate:
    return Estimate(value, value - spread, value + spread, "95% bootstrap")


def decided(
    found: Quantized, monkeypatch: pytest.MonkeyPatch, files: dict[int, Estimate], slow: Sequence[str]
) -> tuple[Quantized, OnnxFile, list[str], Estimate, int]:
    """What `fast_enough` decides, and how many files it wrote.

    Args:
        found: The network.
        monkeypatch: Fakes the timings.
        files: Speed of a file by how many of its layers run in floating point.
        slow: Stages that are not clearly faster in integers.
    """
    exact = OnnxFile(Path("float.onnx"), 1, {}, False)
    written: list[OnnxFile] = []

    def write(what: Quantized) -> OnnxFile:
        kept = len(integer_layers(found.model)) - len(integer_layers(what.model))
        written.append(OnnxFile(Path("net.onnx"), 1, {"Conv": kept}, False))
        return written[-1]

    monkeypatch.setattr(speed, "time_files", lambda exact, integer, *args, **kwargs: integer.float_layers)
    monkeypatch.setattr(speed, "speedup", lambda layers: files[layers])
    monkeypatch.setattr(speed, "slower_stages", lambda *args: dict.fromkeys(slow))
    return *fast_enough(found, exact, write, images(16), QUICK), len(written)


def test_a_file_that_is_clearly_faster_is_taken_as_it_is(found: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, file, names, _, written = decided(found, monkeypatch, {0: estimate(1.5)}, ["stages.1"])
    assert kept is found and not names and file.float_layers == 0 and written == 1


@pytest.mark.parametrize("whole", [estimate(0.5), estimate(1.1, spread=0.2)], ids=["slow", "within the spread"])
def test_else_stages_that_are_not_clearly_faster_stay_as_they_are(
    found: Quantized, monkeypatch: pytest.MonkeyPatch, whole: Estimate
) -> None:
    timed = {0: whole, 3: estimate(1.2)}
    kept, file, names, value, written = decided(found, monkeypatch, timed, ["stages.1"])
    assert (names, file.float_layers, value.value, written) == (["stages.1"], 3, 1.2, 2)
    assert len(integer_layers(kept.model)) == 4


def test_where_no_stage_wins_the_network_stays_in_floating_point(
    found: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = [stage.name for stage in found.plan.stages]
    cases = {
        "no stage": ({0: estimate(0.5)}, every, 1),
        "all but one, and that does not make up for the rest": ({0: estimate(0.5), 6: estimate(0.9)}, every[:-1], 2),
        "each alone, but not together": ({0: estimate(0.9)}, [], 1),
    }
    for timed, slow, files in cases.values():
        kept, file, names, value, written = decided(found, monkeypatch, timed, slow)
        assert names == every and written == files
        assert kept.model is found.merged and file.path == Path("float.onnx")
        assert (value.low, value.value, value.high) == (1, 1, 1)


def test_a_stage_goes_to_integers_only_if_it_wins_by_more_than_the_spread(
    found: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    ratios = [estimate(1.3), estimate(1.3, spread=0.4), estimate(0.7), estimate(1.02)]

    def ratio(times: Any) -> Estimate:
        seen.append(times)
        return ratios[len(seen) - 1]

    monkeypatch.setattr(speed, "speedup", ratio)
    monkeypatch.setattr(speed, "STAGE_ROUNDS", 1)
    names = [stage.name for stage in found.plan.stages]
    assert list(slower_stages(found, images(4), QUICK)) == names[1:3] and len(names) == 4
    assert all({"floating point", "integers"} == set(times.samples) for times in seen), "each is timed alone"


def test_both_files_are_timed_in_turns(found: Quantized, tmp_path: Any) -> None:
    files = (
        export_float(found.merged, images(2), tmp_path / "a.onnx"),
        export_quantized(found.model, images(2), tmp_path / "b.onnx"),
    )
    value = speedup(time_files(*files, images(1), rounds=3))
    assert 0 < value.low <= value.value <= value.high
