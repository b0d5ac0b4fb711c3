"""A delta beside the expert that it stands for, in weights and answers, and written out as a plain checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build
from tuned_models import IDS, logits, tuned

from tersor import zoo
from tersor.experts.compress import compress_expert
from tersor.experts.config import BaseMismatchError, DeltaConfig
from tersor.experts.host import merge_expert
from tersor.experts.verify import compare_answers, compare_weights, merge_folder

pytestmark = pytest.mark.filterwarnings("ignore:no calibration data")


@pytest.fixture(scope="module")
def folders(base: Any, expert: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, model in {"base": base, "expert": expert, "other": tuned(base, 7)}.items():
        model.save_pretrained(root / name)
        zoo.load("tiny-lm")[1].save_pretrained(root / name)
    return {name: root / name for name in ("base", "expert", "other")}


def packed(folders: dict[str, Path], **settings: Any) -> Any:
    return compress_expert(folders["base"], folders["expert"], DeltaConfig(**settings))


def test_errors_of_weights_are_those_that_compressing_found(folders: dict[str, Path]) -> None:
    delta = packed(folders, num_salient=2)
    errors = compare_weights(delta, folders["base"], folders["expert"])
    assert errors == pytest.approx({name: linear.error for name, linear in delta.manifest.modules.items()}, rel=1e-3)
    finer = compare_weights(packed(folders, bits=8, num_salient=0), folders["base"], folders["expert"])
    assert max(finer.values()) < 0.02 < min(errors.values())


def test_another_base_and_another_expert_are_refused(folders: dict[str, Path]) -> None:
    delta = packed(folders, num_salient=0)
    with pytest.raises(BaseMismatchError, match=r"is another model .*give that base"):
        compare_weights(delta, folders["other"], folders["expert"])
    with pytest.raises(ValueError, match="was it made from another expert"):
        compare_weights(delta, folders["base"], folders["other"])


def test_an_exact_delta_answers_as_the_expert(folders: dict[str, Path]) -> None:
    texts = ["a text to read", "x", "another one"]
    exact = packed(folders, num_salient=1.0, salient_dtype="float32")
    found = compare_answers(exact, folders["base"], folders["expert"], texts)
    assert found["kl"] == pytest.approx(0, abs=1e-6) and found["same_top"] == 1.0
    assert found["perplexity"] == pytest.approx(found["expert_perplexity"], rel=1e-4)
    assert (found["texts"], found["tokens"]) == (2, len(texts[0]) + len(texts[2]) - 2)
    coarse = compare_answers(packed(folders, bits=1, num_salient=0), folders["base"], folders["expert"], texts)
    assert coarse["kl"] > 100 * abs(found["kl"]) and coarse["kl_low"] <= coarse["kl"] <= coarse["kl_high"]
    with pytest.raises(ValueError, match="no text has two tokens"):
        compare_answers(exact, folders["base"], folders["expert"], ["x"])


def test_a_merged_folder_is_the_merged_model(folders: dict[str, Path], base: Any, tmp_path: Path) -> None:
    delta = packed(folders, num_salient=2)
    out = tmp_path / "merged"
    out.mkdir()
    merge_folder(delta, folders["base"], out)
    loaded = type(base).from_pretrained(out).eval()
    assert torch.equal(logits(loaded, IDS), logits(merge_expert(base, delta), IDS))
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1, "weights are for whoever may read the rest"
    assert (out / "tokenizer.json").is_file() and [each.name for each in tmp_path.iterdir()] == ["merged"]
    with pytest.raises(BaseMismatchError):
        merge_folder(delta, folders["other"], tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    assert build("llama").dtype == loaded.dtype
