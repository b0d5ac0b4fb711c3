"""`tersor experts bench` on a tiny shape: every timing is of what it says, and records are complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tersor.cli import run
from tersor.experts.bench.speed import CONTEXT, Decoder, random_expert, random_model, time_registered, with_expert
from tersor.experts.config import DeltaConfig
from tersor.experts.delta import ExpertDelta
from tersor.experts.host import ExpertHost


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("tiny", seed=1)


def test_random_experts_are_whole_deltas(model: Any, tmp_path: Path) -> None:
    config = DeltaConfig(num_salient=3)
    delta = random_expert(model, config, seed=2)
    delta.save_pretrained(tmp_path)
    read = ExpertDelta.from_pretrained(tmp_path)
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in delta.tensors.items())
    linears = {name for name, module in model.model.layers.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(delta.manifest.modules) == {f"model.layers.{name}" for name in linears}
    assert delta.dense("model.layers.0.mlp.up_proj").abs().max() > 0
    other = random_expert(model, config, seed=3)
    assert not torch.equal(
        other.tensors["model.layers.0.mlp.up_proj.qweight"], read.tensors["model.layers.0.mlp.up_proj.qweight"]
    )
    with pytest.raises(ValueError, match="choose one of"):
        random_model("huge", seed=1)


def test_what_is_timed_answers_as_the_expert(model: Any) -> None:
    """The timed call runs the model with the expert's routes, one token behind the same context each time."""
    host = ExpertHost(model)
    host.load_expert("a", random_expert(model, DeltaConfig(), seed=1))
    decode = Decoder(model, 2)
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.float()))
    for names in (None, "a", None, ["a", "a"]):
        with_expert(host, names, decode)()
        assert decode.cache.get_seq_length() == CONTEXT
    handle.remove()
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[3])
    host.close()


def test_registered_experts_are_all_resident(model: Any) -> None:
    host = ExpertHost(model)
    deltas = (random_expert(model, DeltaConfig(), seed=seed) for seed in range(3))
    found = time_registered(host, deltas, (1, 3), tokens=1, repeats=2)
    assert {count: len(seconds) for count, seconds in found.items()} == {1: 2, 3: 2}
    assert set(host.list_experts().values()) == {"device"}
    host.close()


def test_every_part_gives_records(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    parts = [part for name in ("decode", "switch", "mixed", "registered", "load") for part in ("--what", name)]
    out = tmp_path / "speed.jsonl"
    assert run(["experts", "bench", *parts, "--shape", "tiny", "--repeats", "3", "--out", str(out), "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [json.loads(line) for line in out.read_text().splitlines()] == told
    known = {(row["item"], row["quantity"]): row for row in told}
    assert known["decoding one row", "time per token over the base's"]["peer"] > 1
    assert known["switching among resident experts", "time of a switch"]["measured"] < 1
    assert known["8 rows of 4 experts", "time of four passes over that of one batch"]["measured"] > 0
    assert (
        known["1 experts registered", "tokens per second"]["baseline"]
        == known["16 experts registered", "tokens per second"]["baseline"]
    )
    assert known["from cold files until loaded", "time of a whole model over that of a delta"]["peer"] > 1
    assert all("random, tiny" in row["shapes"] for row in told)


def test_the_table(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["experts", "bench", "--what", "switch", "--shape", "tiny"]) == 0
    assert "time of a switch" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--what", "all"], ["--shape", "huge"], ["--repeats", "0"], ["--bits", "5"]])
def test_bad_input(options: list[str], capsys: pytest.CaptureFixture) -> None:
    assert run(["experts", "bench", *options]) == 2
    assert capsys.readouterr().err.startswith("tersor: ")
