"""tiny-lm-tied: pairs of layers that cache alike, and the recipe that makes it from tiny-lm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tersor import MiniCache, zoo
from tersor.kv.bench.contenders import FULL, pick
from tersor.kv.bench.recall import pooled, score_recall
from tersor.kv.bench.tasks import PLANTED, recall_samples
from tersor.kv.depth.similarity import analyze_layer_similarity


@pytest.fixture(scope="module")
def lock() -> dict:
    return json.loads((zoo.path("tiny-lm-tied") / "recipe.lock.json").read_text())


def test_tied_weights_are_equal_and_so_is_what_the_card_says(lock: dict) -> None:
    model = zoo.load_model("tiny-lm-tied")
    for one, other in lock["pairs"]:
        first, second = (model.model.layers[index] for index in (one, other))
        for name in lock["tied"]:
            assert torch.equal(first.get_parameter(name), second.get_parameter(name)), (one, name)
        assert not torch.equal(first.self_attn.q_proj.weight, second.self_attn.q_proj.weight)
    card = zoo.card("tiny-lm-tied")
    for row in lock["similarity"]:
        assert f"{row['mean_cosine']:.3f}" in card
    assert f"{lock['scores']['bits_per_byte']:.3f} bits per byte" in card
    assert lock["minutes"] <= 60


def test_the_tied_pairs_are_similar_and_minicache_finds_them(lock: dict) -> None:
    model, tokenizer = zoo.load("tiny-lm-tied")
    book = zoo.book()
    ids = torch.tensor([tokenizer.encode(book[start : start + 512]) for start in range(0, 4096, 1024)])
    rows = {(row.layers, row.kind): row.mean_cosine for row in analyze_layer_similarity(model, ids).rows}
    for pair in [tuple(pair) for pair in lock["pairs"]]:
        assert min(rows[pair, "keys"], rows[pair, "values"]) > 0.8
    assert max(rows[(0, 1), "keys"], rows[(1, 2), "keys"], rows[(3, 4), "keys"]) < 0.5
    assert MiniCache.auto(model, ids).pairs == tuple(tuple(pair) for pair in lock["pairs"])


def test_it_recalls_as_the_card_says(lock: dict) -> None:
    assert lock["scores"]["recall"]["1024"]["planted facts"]["share"] >= 0.95
    model, tokenizer = zoo.load("tiny-lm-tied")
    results = {
        task: score_recall(model, tokenizer.encode, recall_samples(task, n=8, prose=zoo.book(), seed=8), pick([]))
        for task in PLANTED
    }
    assert pooled(results)[FULL].mean().value > 0.9


def test_training_keeps_tied_weights_equal() -> None:
    from tiny_lm_tied import average_gradients, tie, tied_weights

    model = zoo.load_model("tiny-lm").train()
    tie(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer.register_step_pre_hook(lambda *_: average_gradients(model))
    ids = torch.tensor([list(zoo.book()[:128].encode())])
    for _ in range(2):
        before = tied_weights(model)[0][0].clone()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(torch.equal(one, other) for one, other in tied_weights(model))
        assert not torch.equal(before, tied_weights(model)[0][0])


@pytest.mark.slow
def test_the_recipe_runs_and_resumes(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tiny_lm_tied

    command = ["--data", str(library), "--out", str(tmp_path), "--smoke", "--threads", "1"]
    for _ in range(2):
        assert tiny_lm_tied.main(command) == 0
    assert capsys.readouterr().out.count("'step': 6") == 1  # the second run had nothing left to train
    made = json.loads((tmp_path / "tiny-lm-tied" / "recipe.lock.json").read_text())
    assert made["steps"] == 6
    assert "similarity" in (tmp_path / "tiny-lm-tied" / "CARD.md").read_text().lower()
    assert tiny_lm_tied.main(["--data", str(tmp_path), "--out", str(tmp_path / "other")]) == 2
