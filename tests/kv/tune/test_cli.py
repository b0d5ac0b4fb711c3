"""`tersor tune` from texts to a plan that the other commands take, and what it refuses before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tersor import CachePlan, ZipCache, zoo
from tersor.cli import run
from tersor.kv.plan import read_plan
from tersor.zoo import loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers that reads bytes, and texts."""
    folder = tmp_path_factory.mktemp("tune")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=258, num_hidden_layers=2, initializer_range=0.3, **shape)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    zoo.load("tiny-lm")[1].save_pretrained(folder / "model")
    book = zoo.book()
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": book[i : i + 600]}) + "\n" for i in range(0, 6000, 600))
    )
    (folder / "short.txt").write_text(book[:900])
    return folder


def tune(folder: Path, *more: str, budget: str = "3.5x", **options: str) -> int:
    """Run the command with short pieces; returns its exit code."""
    given = {"model": folder / "model", "texts": folder / "texts.jsonl", "out": folder / "plan.json"} | options
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return run(["tune", *words, "--budget", budget, "--tokens", "256", "--pieces", "8", *more])


@pytest.fixture(scope="module")
def plan(folder: Path) -> CachePlan:
    assert tune(folder) == 0
    return read_plan(folder / "plan.json")


def test_a_table_ends_with_how_to_use_the_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(folder, out=str(folder / "table.json")) == 0
    told = capsys.readouterr()
    assert "4 pieces held out" in told.out
    assert "widths by layer" in told.out
    assert told.out.rstrip().endswith(f"table.json: use it with --cache {folder / 'table.json'}")


def test_json_says_what_was_found_and_the_seed_repeats_it(
    folder: Path, plan: CachePlan, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(folder, "--json", out=str(folder / "again.json")) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (folder / "again.json").read_text() == (folder / "plan.json").read_text()
    first = facts["settings"][0]
    assert facts["chosen"] == first["name"]
    assert first["more_than_chosen"] == [0.0, 0.0, 0.0]
    assert all(each["times_smaller"] > 3.4 for each in facts["settings"])
    if plan.layers is not None:
        assert len(facts["key_bits"]) == len(facts["value_bits"]) == len(facts["layers_alone"]) == 2
    assert facts["budget"] == 3.5
    assert facts["pieces"] == 4


def test_generate_takes_the_plan(folder: Path, plan: CachePlan, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model", str(folder / "model"), "--max-new-tokens", "2", "--prompt-file"]
    assert run([*words, str(folder / "short.txt"), "--cache", str(folder / "plan.json"), "--json"]) == 0
    cache = json.loads(capsys.readouterr().out)["cache"]
    assert cache["method"] == plan.method().name
    assert sum(count for width, count in cache["tokens_by_width"].items() if width != "buffer") == 2 * 900
    other = folder / "other.json"
    other.write_text(CachePlan(recipes=(ZipCache(),), layers=(0, 0)).to_json())
    # tiny-lm has eight layers.
    assert run(["generate", "--cache", str(other), "--prompt-file", str(folder / "short.txt")]) == 2
    assert "for 2 compressed layers, this model (LlamaConfig) has 8" in capsys.readouterr().err


REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "no times": ({"budget": "small"}, "--budget 'small' must be a number above 1 and an x"),
    "no saving": ({"budget": "1x"}, "must be a number above 1"),
    "another file": ({"out": "plan.txt"}, "--out plan.txt must end in .json"),
    "seed": ({"seed": "-1"}, "--seed -1 must not be negative"),
    "tokens": ({"tokens": "128"}, "--tokens 128 must be at least 256"),
    "pieces": ({"pieces": "4"}, "--pieces 4 must be at least 8"),
    "no texts": ({"texts": "nowhere.txt"}, "--texts nowhere.txt: no such file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_tuned_is_refused_before_the_model_is_loaded(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: Any) -> None:
        pytest.fail("loaded")

    monkeypatch.setattr(loading, "load", load)
    changed, message = REFUSED[name]
    budget = changed.get("budget", "3.5x")
    more = [word for each in ("seed", "tokens", "pieces") if each in changed for word in (f"--{each}", changed[each])]
    paths = {each: changed[each] for each in ("out", "texts") if each in changed}
    assert tune(folder, *more, budget=budget, **paths) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_too_little_text_and_pieces_too_long_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(folder, texts=str(folder / "short.txt")) == 2
    assert "--texts holds 3 pieces of 256 tokens, and it takes 8" in capsys.readouterr().err
    assert tune(folder, "--tokens", "4096") == 2
    assert "--tokens 4096 exceed the model's 2048 positions" in capsys.readouterr().err


def test_a_budget_out_of_reach_leaves_no_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(folder, budget="30x", out=str(folder / "none.json")) == 2
    assert "no setting makes the cache 30 times smaller: the nearest is" in capsys.readouterr().err
    assert not (folder / "none.json").exists()
