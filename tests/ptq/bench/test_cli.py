"""`tersor bench ptq`: records and the table."""

from __future__ import annotations

from tersor.bench.records import Record, read_jsonl
from tersor.cli import run


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
