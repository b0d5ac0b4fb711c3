import dataclasses
import json

import pytest

from tersor.bench.records import VERDICTS, Record, read_jsonl, write_jsonl

# The format is public: tools read it, so these names may gain company but never change.
FIELDS = [
    *["system", "item", "quantity", "unit", "claim", "claim_source"],
    *["measured", "low", "high", "interval", "baseline", "peer", "peer_name"],
    *["n", "seed", "model", "shapes", "versions", "machine", "command", "verdict"],
]


def test_the_fields_are_the_documented_ones():
    assert [field.name for field in dataclasses.fields(Record)] == FIELDS


def test_json_round_trip_is_one_line(make_record):
    record = make_record(item='line\nbreak, "quotes", ü', claim="41.62 → 41.24")
    line = record.to_json()
    assert "\n" not in line
    assert list(json.loads(line)) == FIELDS
    assert Record.from_json(line) == record


def test_the_estimate_of_a_measurement_fits_a_record(make_record):
    from tersor.bench.measure import bootstrap_interval, machine, versions

    estimate = bootstrap_interval([1.0, 2.0, 4.0])
    record = make_record(
        measured=estimate.value, low=estimate.low, high=estimate.high, interval=estimate.interval,
        machine=machine(), versions=versions(),
    )  # fmt: skip
    assert Record.from_json(record.to_json()) == record


@pytest.mark.parametrize("verdict", VERDICTS)
def test_every_verdict_is_accepted(make_record, verdict):
    assert make_record(verdict=verdict).verdict == verdict


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "great"}, "verdict is 'great'"),
        ({"measured": float("nan")}, "finite"),
        ({"baseline": float("inf")}, "finite"),
        ({"claim": float("nan")}, "finite"),
        ({"low": 5.0}, "low <= measured <= high"),
        ({"high": 4.0}, "low <= measured <= high"),
        ({"low": None}, "go together"),
        ({"interval": None}, "go together"),
        ({"interval": "about"}, "95% bootstrap"),
        ({"measured": None, "low": None, "high": None, "interval": None}, "measured is None"),
        ({"peer": None}, "go together"),
        ({"n": 0}, "n is 0"),
        ({"n": 2.5}, "n is 2.5"),
        ({"seed": -1}, "seed is -1"),
        ({"system": " "}, "system is ' '"),
        ({"command": ""}, "command is ''"),
    ],
)
def test_inconsistent_records_are_refused(make_record, change, message):
    with pytest.raises(ValueError, match=message):
        make_record(**change)


@pytest.mark.parametrize("change", [{"measured": "4.6"}, {"peer": True}, {"unit": None}, {"versions": "2.13"}])
def test_wrong_types_are_refused(make_record, change):
    with pytest.raises(TypeError, match=next(iter(change))):
        make_record(**change)


def test_what_needs_a_gpu_has_no_number(make_record):
    record = make_record(measured=None, low=None, high=None, interval=None, verdict="not here: needs a GPU")
    assert Record.from_json(record.to_json()) == record


def test_added_fields_are_tolerated_and_missing_ones_named(make_record):
    data = json.loads(make_record().to_json())
    assert Record.from_json(json.dumps(data | {"energy": 3})) == make_record()
    data["verdikt"] = data.pop("verdict")
    with pytest.raises(ValueError, match="lacks verdict; unknown: verdikt"):
        Record.from_json(json.dumps(data))
    with pytest.raises(ValueError, match="JSON object; got list"):
        Record.from_json("[]")


def test_files_round_trip_and_are_replaced_whole(tmp_path, make_record):
    path = tmp_path / "out" / "records.jsonl"
    records = [make_record(item=f"row {i}\u2028") for i in range(3)]  # U+2028 splits lines for str.splitlines
    write_jsonl(path, records)
    write_jsonl(path, records[:2])
    assert read_jsonl(path) == records[:2]
    assert [entry.name for entry in path.parent.iterdir()] == ["records.jsonl"]


def test_a_bad_line_is_located(tmp_path, make_record):
    path = tmp_path / "records.jsonl"
    path.write_text(make_record().to_json() + "\n\n{}\n")
    with pytest.raises(ValueError, match=r"records\.jsonl:3: the record lacks system"):
        read_jsonl(path)
    path.write_text("not json\n")
    with pytest.raises(ValueError, match=r"records\.jsonl:1: "):
        read_jsonl(path)
