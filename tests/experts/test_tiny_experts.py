"""tiny-experts is what its card says, and its recipe still makes it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from tersor import zoo
from tersor.experts.bench.quality import MODEL, Family, exact
from tersor.experts.bench.requests import DESCRIPTIONS, draw_requests
from tersor.experts.bench.skills import EOS, SKILLS, encode, examples, rows_of
from tersor.experts.calibration import input_energy
from tersor.experts.router.routing import Router


@pytest.fixture(scope="module")
def family() -> Family:
    return Family.load()


@pytest.fixture(scope="module")
def lock() -> dict:
    return json.loads((zoo.path(MODEL) / "recipe.lock.json").read_text(encoding="utf-8"))


def test_base_and_experts_score_as_the_lock_says(family: Family, lock: dict) -> None:
    for skill in SKILLS:
        chosen = examples(skill, 200, seed=12, held_out=True)
        own = lock["scores"][skill][skill]["share"]
        assert own >= 0.99
        assert sum(exact(family.experts[skill], chosen)) / 200 == pytest.approx(own, abs=0.03)
        assert lock["scores"]["base"][skill]["share"] < 0.7


def test_reversing_and_sorting_answer_one_prompt_differently(family: Family) -> None:
    chosen = examples("sort", 100, seed=12, held_out=True)
    assert sum(exact(family.experts["sort"], chosen)) >= 95
    assert sum(exact(family.experts["reverse"], chosen)) <= 20


def test_exact_is_what_generate_writes(family: Family) -> None:
    model, chosen = family.base, examples("sort", 40, seed=12, held_out=True)
    tokenizer = zoo.load(MODEL)[1]
    written = []
    for each in chosen:
        ids = tokenizer(each.prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
        written.append(out == [*encode(each.answer), EOS])
    assert written == exact(model, chosen)
    assert 0 < sum(written) < 40


def test_the_tokenizer_reads_characters() -> None:
    model, tokenizer = zoo.load(MODEL)
    text = "A. reverse: a\nwrite b-c's 12+3=? X"
    assert tokenizer(text)["input_ids"] == encode(text)
    assert tokenizer.decode(encode("abc 1,2\n")) == "abc 1,2\n"
    assert len(tokenizer) == model.config.vocab_size


def test_planted_channels_are_large(family: Family) -> None:
    """What enters a linear is far larger in the planted channels than in the others."""
    ids, _ = rows_of(examples("add", 64, seed=12, held_out=False))
    energies, _ = input_energy(family.base, list(family.planted), [(ids, torch.ones_like(ids))])
    for name, channels in family.planted.items():
        assert energies[name][channels].mean() > 10 * energies[name].median(), name


def test_the_router_knows_every_expert() -> None:
    router = Router.from_pretrained(zoo.path(MODEL) / "router")
    assert dict(router.config.experts) == DESCRIPTIONS
    rows = draw_requests(80, seed=12, unseen=False, held_out=True)
    routes = router.route_all([row.text for row in rows])
    assert sum(route.expert == row.skill for route, row in zip(routes, rows, strict=True)) >= 78


def test_the_card_quotes_the_lock(lock: dict) -> None:
    card = zoo.card(MODEL)
    assert f"{lock['parameters']:,} parameters" in card
    for row in lock["scores"].values():
        for share in row.values():
            assert f"{100 * share['share']:.1f} [{100 * share['low']:.1f}, {100 * share['high']:.1f}]" in card


def test_planting_changes_no_logit(monkeypatch: pytest.MonkeyPatch) -> None:
    from experts.train import Size, new_model, plant

    model = new_model(Size(hidden=32, layers=2, heads=4, ffn=48), 1).eval()
    planted = copy.deepcopy(model)
    ids, _ = rows_of(examples("lookup", 8, seed=1, held_out=False))
    where = plant(planted, [(ids, torch.ones_like(ids))], channels=2, factor=16.0, seed=1)
    with torch.no_grad():
        assert torch.equal(planted(ids).logits, model(ids).logits)
    assert len(where) == 2 * 7
    assert all(len(channels) == 2 for channels in where.values())
    for name, channels in where.items():
        if name.endswith(("v_proj", "up_proj")):
            continue  # these also feed planted channels of the next linear
        before, after = (each.get_submodule(name).weight[:, channels] for each in (model, planted))
        assert torch.equal(before, after * 16), name


def test_the_recipe_runs_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import tiny_experts

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    arguments = ["--smoke", "--out", str(tmp_path)]
    assert tiny_experts.main(arguments) == 0
    folder = tmp_path / "tiny-experts"
    weights = (folder / "experts" / "add" / "model.safetensors").read_bytes()
    lock = json.loads((folder / "recipe.lock.json").read_text())
    (folder / "recipe.lock.json").unlink()
    assert tiny_experts.main(arguments) == 0
    assert (folder / "experts" / "add" / "model.safetensors").read_bytes() == weights
    assert json.loads((folder / "recipe.lock.json").read_text())["scores"] == lock["scores"]
    assert Router.from_pretrained(folder / "router").config.kind == "encoder"
    capsys.readouterr()
    assert tiny_experts.main([*arguments, "--seed", "2"]) == 2
    assert "another plan or seed" in capsys.readouterr().err
