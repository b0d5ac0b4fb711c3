"""The shipped checkpoint is what its card says, and its recipe still makes it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tersor import zoo
from tersor.kv.bench.contenders import FULL, pick
from tersor.kv.bench.recall import pooled, score_recall
from tersor.kv.bench.tasks import PLANTED, recall_samples

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture(scope="module")
def lock() -> dict:
    return json.loads((zoo.path("tiny-lm") / "recipe.lock.json").read_text())


def test_names_and_errors() -> None:
    assert "tiny-lm" in zoo.names()
    with pytest.raises(ValueError, match="tiny-lm"):
        zoo.path("huge-lm")
    with pytest.raises(ValueError, match="no model"):
        zoo.load("../tiny-lm")


def test_tiny_lm_is_a_real_llama() -> None:
    from transformers import LlamaForCausalLM

    model, _ = zoo.load("tiny-lm")
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.float32
    assert not model.training
    assert model.config.num_hidden_layers >= 8
    assert model.config.num_key_value_heads < model.config.num_attention_heads


def test_one_token_is_one_byte() -> None:
    _, tokenizer = zoo.load("tiny-lm")
    text = "".join(map(chr, range(1, 300))) + " naïve – “quoted”\n"
    ids = tokenizer(text)["input_ids"]
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.padding_side == "left"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257)


def test_the_card_quotes_the_lock(lock: dict) -> None:
    card = zoo.card("tiny-lm")
    for scores in lock["scores"]["recall"].values():
        for score in scores.values():
            assert f"{100 * score['share']:.1f} %" in card
    assert f"{lock['scores']['bits_per_byte']:.3f} bits per byte" in card
    assert f"{lock['steps']:,} steps" in card


def test_recall_is_what_the_goal_asks_for(lock: dict) -> None:
    assert lock["scores"]["recall"]["1024"]["planted facts"]["share"] >= 0.95
    assert lock["minutes"] <= 60


def test_the_shipped_weights_score_as_the_card_says(lock: dict) -> None:
    model, tokenizer = zoo.load("tiny-lm")
    results = {
        task: score_recall(model, tokenizer.encode, recall_samples(task, n=24, prose=zoo.book(), seed=8), pick([]))
        for task in PLANTED
    }
    scores = pooled(results)[FULL]
    assert len(scores.values) == 96
    # Four standard deviations of 96 draws, and the excerpt is not the whole book.
    assert abs(scores.mean().value - lock["scores"]["recall"]["1024"]["planted facts"]["share"]) < 0.08


def test_the_book_was_held_out(lock: dict) -> None:
    source = (zoo.path("tiny-lm").parents[1] / "texts" / "SOURCE.md").read_text()
    assert "Treasure Island" in lock["held_out"][0]
    assert lock["sha256"][lock["held_out"][0]] in source
    assert len(zoo.book()) == 300_000
    assert zoo.book().isascii()


def recipe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RECIPES / "tiny_lm.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)


@pytest.mark.slow
def test_the_recipe_runs_resumes_and_repeats(library: Path, tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        out = tmp_path / name
        done = recipe("--data", str(library), "--out", str(out), "--smoke", "--threads", "1")
        assert done.returncode == 0, done.stderr
        again = recipe("--data", str(library), "--out", str(out), "--smoke", "--threads", "1")
        assert again.returncode == 0, again.stderr
        runs.append(json.loads((out / "tiny-lm" / "recipe.lock.json").read_text()))
    assert runs[0]["first_losses"] == pytest.approx(runs[1]["first_losses"], rel=1e-3)
    assert len(runs[0]["first_losses"]) == 10
    assert (tmp_path / "one" / "tiny-lm" / "CARD.md").is_file()
    assert (tmp_path / "one" / "texts" / "book.txt").is_file()


def test_the_recipe_refuses_bad_data_early(tmp_path: Path) -> None:
    done = recipe("--data", str(tmp_path), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("tiny_lm: no *.txt books")


def test_fetched_books_are_checked_against_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm import data as tiny_lm_data

    text = "chapter one"
    known = {"sha256": {"An Author - A Title": hashlib.sha256(text.encode()).hexdigest()}}
    (tmp_path / "recipe.lock.json").write_text(json.dumps(known))
    monkeypatch.setattr(tiny_lm_data.zoo, "path", lambda name: tmp_path)
    archive = tmp_path / "main.zip"
    for content, good in (("changed", False), (text, True)):
        with zipfile.ZipFile(archive, "w") as bundle:
            bundle.writestr("classic-books-markdown-main/An Author/A Title.md", content)
        if good:
            folder = tiny_lm_data.fetch_books(tmp_path / "books", archive.as_uri())
            assert (folder / "An Author - A Title.txt").read_text() == text
        else:
            with pytest.raises(ValueError, match="missing or has changed"):
                tiny_lm_data.fetch_books(tmp_path / "books", archive.as_uri())


def test_a_structured_start_copies_before_any_training() -> None:
    """Layers 0 and 1 find where the last three bytes stood before; the rest of the model is random."""
    from lm.train import new_model

    model = new_model(1).eval()
    block = torch.randint(32, 127, (8, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        predicted = model(torch.cat([block, block], 1)).logits[:, 68:127].argmax(-1)
    assert (predicted == block[:, 5:]).float().mean() > 0.9
