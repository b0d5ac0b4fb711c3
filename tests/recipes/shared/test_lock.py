"""Locks and cards: what stands in them, and that the shipped cards are what the recipes make of the shipped locks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import experts.export
import nar.export
import pytest
import raster.export
import repvgg.export
import tiny_recall
import tiny_vlm_zipr1
import vlm.export
import vlm_small.export
from shared.lock import Lock, percent, share_of, write_lock

from tersor import zoo


def of_nar(name: str, lock: Lock) -> str:
    config = zoo.load_model(name).config
    return nar.export.card(name, config.exits[-1] - config.num_hidden_layers, lock)


def of_network(name: str, lock: Lock) -> str:
    return repvgg.export.card(name, zoo.load_network(name), lock)


CARDS: dict[str, Callable[[str, Lock], str]] = {
    "tiny-experts": lambda name, lock: experts.export.card(lock),
    "tiny-mobileone": of_network,
    "tiny-nar": of_nar,
    "tiny-nar-text": of_nar,
    "tiny-nar-video": of_nar,
    "tiny-raster": lambda name, lock: raster.export.card(lock),
    "tiny-recall": lambda name, lock: tiny_recall.card(lock),
    "tiny-repvgg": of_network,
    "tiny-vlm": lambda name, lock: vlm.export.card(lock),
    "tiny-vlm-zipr1": lambda name, lock: tiny_vlm_zipr1.card(lock),
    "tiny-vlm-small": lambda name, lock: vlm_small.export.card(lock),
}


@pytest.mark.parametrize("name", CARDS)
def test_the_card_is_what_the_recipe_makes_of_the_lock(name: str) -> None:
    lock = json.loads((zoo.path(name) / "recipe.lock.json").read_text(encoding="utf-8"))
    assert CARDS[name](name, lock) == zoo.card(name)


def test_a_lock_says_where_it_was_made_unless_an_earlier_start_does(tmp_path: Path) -> None:
    made: list[Any] = []
    lock = write_lock(tmp_path, {"seed": 1}, lambda lock: made.append(lock) or "# card\n")
    assert json.loads((tmp_path / "recipe.lock.json").read_text()) == json.loads(json.dumps(lock)) == made[0]
    assert set(lock) == {"seed", "versions", "machine"} and (tmp_path / "CARD.md").read_text() == "# card\n"
    again = write_lock(tmp_path / "other", {"seed": 1, "machine": {"cpu": "old"}})
    assert again["machine"] == {"cpu": "old"} and not (tmp_path / "other" / "CARD.md").exists()


def test_shares() -> None:
    share = share_of(3, 4)
    assert share["share"] == 0.75 and share["n"] == 4 and 0.3 < share["low"] < 0.31 < 0.95 < share["high"]
    assert percent({"share": 0.5, "low": 0.25, "high": 1.0}, sign=" %") == "50.0 % [25.0, 100.0]"
