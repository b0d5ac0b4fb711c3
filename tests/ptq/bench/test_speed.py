"""`tersor bench ptq-speed`: files timed in turns."""

from __future__ import annotations

from tersor.bench.records import read_jsonl
from tersor.cli import run
from tersor.ptq.bench import speed as ptq_speed
from tersor.ptq.networks import RepNetConfig


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
