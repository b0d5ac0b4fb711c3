"""The harness of quantized networks: every method on the same images, runs that go on, records, peers."""

from __future__ import annotations

import importlib.util
import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tersor import zoo
from tersor.bench.records import Record, read_jsonl
from tersor.cli import run
from tersor.ptq.bench import accuracy as ptq
from tersor.ptq.bench import speed as ptq_speed
from tersor.ptq.bench.data import ARCHIVE, load_cifar, photo_crops
from tersor.ptq.networks import RepNetConfig

CLASSES = zoo.load_network("tiny-repvgg").config.classes


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """An archive as the recipes and the benchmark take it, of photographs' squares with classes at random."""
    folder = tmp_path_factory.mktemp("data")
    crops = photo_crops(zoo.photos()[:4])
    with zipfile.ZipFile(folder / ARCHIVE, "w") as archive:
        for index, pixels in enumerate(crops[:80]):
            stored = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(stored, "JPEG")
            part = "train" if index < 40 else "test"
            archive.writestr(f"{part}/{CLASSES[index % 10]}/{index:04}.jpg", stored.getvalue())
    return folder


def test_squares_of_photographs_are_the_photographs() -> None:
    file = zoo.photos()[0]
    crops = photo_crops([file])
    with Image.open(file) as opened:
        whole = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
    assert crops.shape == (6 * 4 + 3 * 2, 3, 32, 32) and torch.equal(crops[1], whole[:, :32, 32:64])


def test_the_archive_is_read_as_it_is_named(data, tmp_path) -> None:
    split = load_cifar(data)
    assert len(split.train) == len(split.held_out) == 40 and split.classes == CLASSES
    assert split.held_out.labels.bincount().tolist() == [4] * 10
    with pytest.raises(ValueError, match=rf"no {ARCHIVE} in this folder; pack one from CIFAR-10"):
        load_cifar(tmp_path)
    (tmp_path / ARCHIVE).write_bytes(b"no zip")
    with pytest.raises(ValueError, match="cannot be read"):
        load_cifar(tmp_path)


def test_every_method_of_ours_is_another_one() -> None:
    base = ptq.RepAPQConfig.of("w4a4")
    settings = [method.settings(base) for method in ptq.METHODS if method.settings is not None]
    assert len(set(settings)) == len(settings) == 11
    with pytest.raises(ValueError, match="is none of"):
        ptq.pick(["GPTQ"])


@pytest.mark.parametrize("name", ["AdaRound-like", "QDrop-like", pytest.param("ONNX Runtime", marks=pytest.mark.slow)])
def test_compared_methods_run(name, data) -> None:
    """On the network that 8 bits do no harm."""
    net, split = zoo.load_network("tiny-mobileone"), load_cifar(data)
    (method,) = ptq.pick([name])
    images = ptq.calibration_images(net, split.train, 32, 0)
    exact = ptq.logits_of(net, net.normalize(split.held_out.pixels))
    config = ptq.RepAPQConfig.of("w8a8", iterations=2)
    found = ptq.quantized_run(method, net, images, config, split.held_out, exact)
    assert sum(found.same) / len(found.same) > 0.8 and found.seconds > 0


def test_a_run_goes_on_where_it_stopped(data, tmp_path, monkeypatch) -> None:
    net, split = zoo.load_network("tiny-repvgg"), load_cifar(data)
    plan = ptq.Plan("tiny-repvgg", ("w4a4",), ("min-max", "its first scales alone"), (0, 1), 16, 2, 40)
    measured, once = ptq.quantized_run, []

    def counted(method, *rest):
        if len(once) == 2:
            raise KeyboardInterrupt
        once.append(method.name)
        return measured(method, *rest)

    monkeypatch.setattr(ptq, "quantized_run", counted)
    file = tmp_path / "p.json"
    with pytest.raises(KeyboardInterrupt):
        list(ptq.run_plan(plan, net, split.train, split.held_out, file))
    monkeypatch.setattr(ptq, "quantized_run", lambda method, *rest: once.append(method.name) or measured(method, *rest))
    found = {name: scores for _, name, scores in ptq.run_plan(plan, net, split.train, split.held_out, file)}
    assert once == ["min-max"] * 2 + ["its first scales alone"] * 2
    assert set(found) == {ptq.FLOAT, "min-max", "its first scales alone"}
    assert found[ptq.FLOAT].agreement().value == 1.0 and len(found["min-max"].runs) == 2
    assert found["its first scales alone"].agreement().value > found["min-max"].agreement().value
    other = ptq.Plan("tiny-repvgg", ("w4a4",), ("min-max",), (0,), 17, 2, 40)
    with pytest.raises(ValueError, match="other settings"):
        list(ptq.run_plan(other, net, split.train, split.held_out, file))


def test_scores_are_worked_out_by_hand() -> None:
    exact = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    logits = exact.clone()
    logits[0] = torch.tensor([0.0, 2.0])
    one = ptq.compare(logits, exact, torch.tensor([0, 0, 1, 0]))
    assert one.right == [0, 1, 1, 0] and one.same == [0, 1, 1, 1]
    assert one.divergence == pytest.approx(2 * (1 - 2 / (1 + np.exp(2))) / 4, abs=1e-6)
    base = ptq.compare(exact, exact, torch.tensor([0, 0, 1, 0]))
    pair = ptq.Scores([one, base])
    assert pair.accuracy().value == pytest.approx(0.625) and pair.spread() == pytest.approx(0.25)
    assert pair.against(ptq.Scores([base])).value == pytest.approx(-0.125)


def test_the_command_writes_records(data, tmp_path, capsys) -> None:
    out = tmp_path / "r.jsonl"
    options = ["--model", "tiny-repvgg", "--method", "min-max", "--bits", "w8a8,w6a6", "--seeds", "2"]
    assert run(["bench", "ptq", "--data", str(data), *options, "--images", "16", "--out", str(out), "--json"]) == 0
    records = read_jsonl(out)
    assert [Record.from_json(each) for each in capsys.readouterr().out.splitlines()] == records
    assert len(records) == 1 + 2 * 6 and not list(tmp_path.glob("*.partial"))
    assert {record.n for record in records} == {40}
    for wrong, said in (
        (["--model", "resnet"], "must be one of"),
        (["--bits", "8"], "such as 'w8a8'"),
        (["--seeds", "0"], "at least 1"),
    ):
        assert run(["bench", "ptq", "--data", str(data), *wrong]) == 2
        assert said in capsys.readouterr().err


def test_speed_is_measured_in_turns(monkeypatch, tmp_path, capsys) -> None:
    small = RepNetConfig(stem=8, widths=(8,), depths=(2,), strides=(2,), classes=("a", "b"), image_size=32)
    monkeypatch.setitem(ptq_speed.SHAPES, "repvgg_a0", small)
    out = tmp_path / "s.jsonl"
    assert (
        run(["bench", "ptq-speed", "--network", "repvgg_a0", "--batches", "1,2", "--rounds", "3", "--out", str(out)])
        == 0
    )
    records = {(record.item, record.quantity): record for record in read_jsonl(out)}
    assert records["repvgg_a0: batch 2", "speed-up"].measured > 0
    assert records["repvgg_a0: batch 1", "layers in floating point"].measured == 0
    assert records["repvgg_a0: batch 1", "layers in floating point"].baseline == 4
    for wrong in (["--network", "resnet18"], ["--batches", "1,x"], ["--rounds", "0"]):
        assert run(["bench", "ptq-speed", *wrong]) == 2
    assert "--rounds 0 at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_long_calibration_is_timed_in_parts(monkeypatch, tmp_path, capsys) -> None:
    file = Path(__file__).resolve().parents[3] / "benchmarks" / "ptq_calibration.py"
    spec = importlib.util.spec_from_file_location("ptq_calibration", file)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    small = RepNetConfig(stem=8, widths=(8, 8), depths=(1, 2), strides=(2, 2), stem_stride=4, classes=("a", "b"))
    monkeypatch.setitem(script.SHAPES, script.NAME, small)
    monkeypatch.setattr(script, "IMAGES", 8)
    monkeypatch.setattr(script, "CONFIG", replace(script.CONFIG, iterations=2))
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.effect_noise((300, 260), 90).convert("RGB").save(photos / "noise.png")
    out = tmp_path / "r.jsonl"
    command = ["--data", str(photos), "--work", str(tmp_path / "work"), "--out", str(out)]
    assert script.main([*command, "--stages", "2"]) == 0
    assert not out.exists() and len(list((tmp_path / "work" / "stages").glob("*.safetensors"))) == 2
    assert script.main(command) == 0
    told = {record.quantity: record.measured for record in read_jsonl(out)}
    assert told["parts that it was interrupted into"] == 2
    assert told["end repeated from a stage border, the same bit for bit (1 yes)"] == 1
