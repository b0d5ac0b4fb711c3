"""Every class of transformers that writes text keeps a session's promises, or is refused with a reason."""

from __future__ import annotations

import os
import random
from datetime import date
from pathlib import Path

import pytest
import torch
import transformers
from sweep import VERDICTS, check, classes, table

from tersor._compat import TRANSFORMERS_BELOW

TABLES = Path(__file__).parents[2] / "docs" / "tables"
FAULTS = VERDICTS[4:]
#: Another tenth every day; the head of the log shows it, and SWEEP_SEED repeats it.
SEED = int(os.environ.get("SWEEP_SEED", date.today().toordinal()))
#: Classes that must be compressed, at least.
LEAST = {"causal": 125, "image-text": 50}


@pytest.fixture(autouse=True)
def global_random_state():
    """Models draw their weights from it."""
    with torch.random.fork_rng():
        yield


def tenth(kind: str, part: int) -> list[str]:
    names = list(classes(kind))
    drawn = random.Random(SEED).sample(names, -(-len(names) // 10))
    return sorted(drawn)[part::2]


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("kind", LEAST)
def test_a_tenth_of_all_classes_has_no_fault(kind: str, part: int) -> None:
    found = classes(kind)
    outcomes = [check(kind, name, found[name]) for name in tenth(kind, part)]
    assert [each for each in outcomes if each.verdict in FAULTS] == [], f"SWEEP_SEED={SEED}"


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", LEAST)
def test_every_class_has_no_fault_and_the_table_says_so(kind: str) -> None:
    outcomes = [check(kind, name, model_type) for name, model_type in classes(kind).items()]
    assert [each for each in outcomes if each.verdict in FAULTS] == []
    assert all(each.reason for each in outcomes if each.verdict != "identical")
    if transformers.__version__.split(".")[:2] != [str(TRANSFORMERS_BELOW[0]), str(TRANSFORMERS_BELOW[1] - 1)]:
        return  # an older release has fewer classes, and the table is of the newest
    assert sum(each.verdict in VERDICTS[:2] for each in outcomes) >= LEAST[kind]
    file = TABLES / f"architectures_{kind.replace('-', '_')}.md"
    if os.environ.get("WRITE_TABLES"):
        file.write_text(table(outcomes), encoding="utf-8")
    assert file.read_text(encoding="utf-8") == table(outcomes), "WRITE_TABLES=1 writes the table anew"
