"""`tersor quantize`: the file, the report, going on after an interruption, and one line for what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from PIL import Image

from tersor import zoo
from tersor.bench.measure import Estimate
from tersor.cli import run
from tersor.ptq import calibration, speed
from tersor.ptq.reparam import merge


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for file in zoo.photos()[:12]:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def timed(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    """As if integers were so many times as fast as floating point, whatever the machine does meanwhile."""
    monkeypatch.setattr(speed, "speedup", lambda times: Estimate(ratio, 0.9 * ratio, 1.1 * ratio, "95% bootstrap"))
    monkeypatch.setattr(speed, "time_files", lambda *args, **options: None)


def command(photos: Path, out: Path, *options: str) -> list[str]:
    start = ["quantize", "--model", "tiny-repvgg", "--calibration", str(photos), "--iterations", "2"]
    return [*start, "--out", str(out), *options]


def test_it_writes_file_and_report_and_goes_on(photos, tmp_path, monkeypatch, capsys) -> None:
    """Stopped before its third stage and started again, it skips two; classes of the evaluation are counted."""
    out = tmp_path / "net.onnx"
    classes = tmp_path / "classes"
    names = zoo.load_network("tiny-repvgg").config.classes
    for index, name in enumerate(names):
        (classes / name).mkdir(parents=True)
        (classes / name / "one.jpg").write_bytes(zoo.photos()[index].read_bytes())
    calibrate, done = calibration.calibrate_block, []

    def stop(block, *rest):
        if block.name == "stages.1.0":
            raise KeyboardInterrupt
        return calibrate(block, *rest)

    timed(monkeypatch, 2.0)
    monkeypatch.setattr(calibration, "calibrate_block", stop)
    assert run(command(photos, out, "--evaluation", str(classes))) == 130
    assert not out.exists() and len(list((tmp_path / "net.onnx.stages").glob("*.safetensors"))) == 2
    monkeypatch.setattr(
        calibration, "calibrate_block", lambda block, *rest: done.append(block.name) or calibrate(block, *rest)
    )
    capsys.readouterr()
    assert run(command(photos, out, "--evaluation", str(classes), "--json")) == 0
    told = capsys.readouterr()
    facts = json.loads(told.out)
    # What follows the first run is the plain network that the report compares with.
    assert done[0] == "stages.1.0" and done.index("stem") == len(done) - 12
    assert "stage 6 of 6" in told.err
    assert facts["float_layers"] == 0 and facts["share_of_float"] < 0.4 and facts["bytes"] == out.stat().st_size
    quantities = {record["quantity"]: record for record in facts["records"]}
    assert set(quantities) == {"accuracy", "agreement with floating point", "file size", "speed"}
    assert quantities["accuracy"]["n"] == 10
    page = out.with_suffix(".html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 2 and "stages.2.0.merged" in page
    assert not (tmp_path / "net.onnx.stages").exists()


def test_fewer_bits_say_that_they_are_simulated(photos, tmp_path, capsys) -> None:
    assert run(command(photos, tmp_path / "low.onnx", "--bits", "w4a4", "--images", "4")) == 0
    assert "simulated" in capsys.readouterr().out
    clips = [node for node in onnx.load(tmp_path / "low.onnx").graph.node if node.op_type == "Clip"]
    assert len(clips) == 10, "all but the image, the mean and what enters the head"


def test_where_integers_win_nowhere_the_file_is_the_network_in_floating_point(
    photos, tmp_path, monkeypatch, capsys
) -> None:
    out = tmp_path / "net.onnx"
    timed(monkeypatch, 0.5)
    monkeypatch.setattr(speed, "slower_stages", lambda found, *rest: [stage.name for stage in found.plan.stages])
    assert run(command(photos, out, "--iterations", "0", "--images", "4", "--opset", "19")) == 0
    told = capsys.readouterr().out
    assert "no stage is clearly faster in integers here" in told and "--keep-float none" in told
    proto = onnx.load(out)
    assert not any("Quantize" in node.op_type for node in proto.graph.node)
    assert [each.version for each in proto.opset_import if not each.domain] == [19]


def line(capsys) -> str:
    (only,) = capsys.readouterr().err.strip().splitlines()
    return only


def test_what_cannot_be_used_is_one_line(photos, tmp_path, capsys) -> None:
    out = tmp_path / "x.onnx"
    empty = tmp_path / "empty"
    empty.mkdir()
    small = tmp_path / "small"
    small.mkdir()
    Image.new("RGB", (20, 40)).save(small / "a.png")
    for options, said in (
        ([*command(tmp_path / "none", out)], "no such folder of pictures"),
        ([*command(empty, out)], "holds no pictures (.png"),
        ([*command(small, out)], "is 20 x 40 pixels; the network takes 32 x 32"),
        ([*command(photos, out, "--bits", "int8")], "such as 'w8a8'"),
        ([*command(photos, out, "--bits", "w16a16")], "8 bits or fewer"),
        ([*command(photos, tmp_path / "x.bin")], "ends in .onnx"),
        ([*command(photos, out, "--images", "0")], "at least 1"),
        ([*command(photos, out, "--weights", "w.pth")], "brings its own"),
        ([*command(photos, out, "--evaluation", str(photos))], "0 folders with images, and the network 10"),
        (["quantize", "--model", "repvgg_a0", "--calibration", str(photos), "--out", str(out)], "needs --weights"),
        (["quantize", "--model", "tiny-lm", "--calibration", str(photos), "--out", str(out)], "classifies no images"),
    ):
        assert run(options) == 2
        assert said in line(capsys)
    assert not out.exists()


def test_networks_that_cannot_be_used_are_one_line(photos, tmp_path, monkeypatch, capsys) -> None:
    """Merged already, without branches, and with activations that are no numbers."""
    net = zoo.load_network("tiny-repvgg")
    merged = merge(net, torch.zeros(1, 3, 32, 32))
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 10, 32), torch.nn.Flatten())
    plain.config = net.config
    infinite = zoo.load_network("tiny-repvgg")
    with torch.no_grad():
        infinite.stages[0][0].norms[0].running_var[0] = torch.nan
    for network, said in (
        (merged, "is one convolution already (BranchedConv); give the model in its training form"),
        (plain, "Sequential has no blocks with branches"),
        (infinite, "NaN or infinity"),
    ):
        monkeypatch.setattr(zoo, "load_network", lambda name, network=network: network)
        assert run(command(photos, tmp_path / "x.onnx")) == 2
        assert said in line(capsys)


def test_the_file_is_made_for_its_target_and_stages_are_kept_by_name(photos, tmp_path, capsys) -> None:
    out = tmp_path / "net.onnx"
    options = ("--iterations", "0", "--uint8-input", "--opset", "19", "--keep-float", "stages.1", "--ignore", "head.fc")
    assert run(command(photos, out, *options, "--json")) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kept_in_float"] == ["stages.1"] and facts["speed"] > 0
    assert facts["left_in_float"] == ["head.fc (ignored)", "stage stages.1 (by keep_float)"]
    proto = onnx.load(out)
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [each.version for each in proto.opset_import if not each.domain] == [19]
    for wrong, says in ((("--keep-float", "nothing"), "no stage 'nothing'"), (("--opset", "9"), "--opset 9 must be")):
        assert run(command(photos, out, *wrong)) == 2
        assert says in capsys.readouterr().err.splitlines()[-1]
    assert run(command(photos, out, "--num-classes", "3")) == 2
    assert "--num-classes is for models of timm" in capsys.readouterr().err
