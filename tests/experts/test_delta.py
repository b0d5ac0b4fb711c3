"""Files: what is written comes back, and what is broken, foreign or hostile is refused with a typed error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tuned_models import tuned

from tersor.experts import delta as module
from tersor.experts.compress import compress_expert
from tersor.experts.config import DeltaConfig, DeltaFormatError
from tersor.experts.delta import MANIFEST, WEIGHTS, ExpertDelta, read_manifest
from tersor.experts.storage import ModelSize

pytestmark = pytest.mark.filterwarnings("ignore:no calibration data")
LINEAR = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def delta(base: Any) -> ExpertDelta:
    return compress_expert(base, tuned(base, 1), DeltaConfig(num_salient=2))


@pytest.fixture
def folder(delta: ExpertDelta, tmp_path: Path) -> Path:
    delta.save_pretrained(tmp_path / "delta", quality="exact match 1.00")
    return tmp_path / "delta"


def test_what_is_saved_comes_back(delta: ExpertDelta, folder: Path) -> None:
    read = ExpertDelta.from_pretrained(folder)
    assert read.manifest == delta.manifest
    assert read.tensors.keys() == delta.tensors.keys()
    for name, tensor in delta.tensors.items():
        assert read.tensors[name].dtype == tensor.dtype
        assert torch.equal(read.tensors[name], tensor)
    assert torch.equal(read.dense(LINEAR), delta.dense(LINEAR))
    card = (folder / "README.md").read_text()
    assert f"{delta.nbytes:,}" in card
    assert "exact match 1.00" in card
    assert sum(delta.bytes_by_part().values()) == delta.nbytes
    read.save_pretrained(folder)  # over the files that it was read from
    again = ExpertDelta.from_pretrained(folder)
    assert all(torch.equal(tensor, delta.tensors[name]) for name, tensor in again.tensors.items())


def test_files_are_as_large_as_the_arithmetic_says(base: Any, delta: ExpertDelta, folder: Path) -> None:
    """Tensors of a float32 model that are stored complete take four bytes a number instead of two."""
    size = ModelSize.of(base.config, type(base))
    expected = size.expert_bytes(bits=2, salient=2) + 2 * size.others
    assert delta.nbytes == expected
    raw = (folder / WEIGHTS).read_bytes()
    assert len(raw) - 8 - int.from_bytes(raw[:8], "little") == expected


def test_large_deltas_are_cut_into_shards(delta: ExpertDelta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 20_000)
    delta.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("delta_model-*.safetensors"))) > 2
    read = ExpertDelta.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, delta.tensors[name]) for name, tensor in read.tensors.items())
    next(tmp_path.glob("delta_model-*.safetensors")).unlink()
    with pytest.raises(DeltaFormatError, match="is missing"):
        ExpertDelta.from_pretrained(tmp_path)


def test_the_expert_s_tokenizer_travels(base: Any, tmp_path: Path) -> None:
    tuned(base, 1).save_pretrained(tmp_path / "expert")
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "expert" / "chat_template.jinja").write_text("{{ messages }}")
    compress_expert(tmp_path / "base", tmp_path / "expert").save_pretrained(tmp_path / "delta")
    assert (tmp_path / "delta" / "chat_template.jinja").read_text() == "{{ messages }}"


Damage = Callable[[Path], object]


def manifest_of(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values))


def tensors_of(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        marks = file.metadata()
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata=marks)


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def index(folder: Path, name: str) -> None:
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"x": name}}))


DAMAGE: dict[str, tuple[Damage, str]] = {
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "no delta_config"),
    "no JSON": (lambda f: cut(f / MANIFEST, 100), "not valid JSON"),
    "a name twice": (lambda f: (f / MANIFEST).write_text('{"a": 1, "a": 2}'), "occurs twice"),
    "no version": (lambda f: manifest_of(f, lambda v: v.pop("format_version")), "format_version"),
    "newer": (lambda f: manifest_of(f, lambda v: v.update(format_version=3)), "upgrade"),
    "older": (lambda f: manifest_of(f, lambda v: v.update(format_version=1)), "pack it again"),
    "a field less": (lambda f: manifest_of(f, lambda v: v.pop("same")), "has fields"),
    "bad setting": (lambda f: manifest_of(f, lambda v: v["config"].update(bits=5)), "bits=5"),
    "bad linear": (lambda f: manifest_of(f, lambda v: v["modules"][LINEAR].update(shape=[0, 4])), "impossible"),
    "bad shape": (lambda f: manifest_of(f, lambda v: v["modules"][LINEAR].update(shape="x")), "inconsistent"),
    "other shape": (lambda f: manifest_of(f, lambda v: v["modules"][LINEAR].update(shape=[64, 32])), "says U8"),
    "traversal": (lambda f: manifest_of(f, lambda v: v["full"].append("../x")), "names a tensor"),
    "tensor unknown": (lambda f: manifest_of(f, lambda v: v["full"].remove("model.norm.weight")), "model.norm.weight"),
    "other base": (lambda f: manifest_of(f, lambda v: v.update(base_fingerprint="0" * 64)), "another base"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "is missing"),
    "cut off": (lambda f: cut(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 10), "not a whole safetensors file"),
    "cut in the header": (lambda f: cut(f / WEIGHTS, 200), "not a whole safetensors file"),
    "empty": (lambda f: cut(f / WEIGHTS, 0), "not a whole safetensors file"),
    "tensor missing": (lambda f: tensors_of(f, lambda t: t.pop(f"{LINEAR}.step")), "lacks 1 tensors"),
    "codes as floats": (
        lambda f: tensors_of(f, lambda t: t.update({f"{LINEAR}.qweight": t[f"{LINEAR}.qweight"].float()})),
        "says U8",
    ),
    "steps as integers": (
        lambda f: tensors_of(f, lambda t: t.update({f"{LINEAR}.step": t[f"{LINEAR}.step"].int()})),
        "says F16 or F32",
    ),
    "NaN": (lambda f: tensors_of(f, lambda t: t[f"{LINEAR}.step"].fill_(torch.nan)), "NaN"),
    "channel out of range": (lambda f: tensors_of(f, lambda t: t[f"{LINEAR}.salient_index"].add_(1000)), "ascend"),
    "channel twice": (lambda f: tensors_of(f, lambda t: t[f"{LINEAR}.salient_index"].zero_()), "ascend"),
    "index outside": (lambda f: index(f, "../elsewhere.safetensors"), "points outside"),
    "index of no file": (lambda f: index(f, "none.safetensors"), "is missing"),
    "index broken": (lambda f: (f / f"{WEIGHTS}.index.json").write_text("[]"), "not a weight index"),
    "no folder": (lambda f: shutil.rmtree(f), "no delta_config"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_broken_files_are_refused(name: str, folder: Path) -> None:
    damage, says = DAMAGE[name]
    damage(folder)
    with pytest.raises(DeltaFormatError, match=says):
        ExpertDelta.from_pretrained(folder)


def test_a_lone_manifest_is_enough_to_read_what_it_says(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert read_manifest(folder).config.num_salient == 2


def test_an_interrupted_save_is_no_delta(delta: ExpertDelta, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module, "save_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        delta.save_pretrained(folder)
    with pytest.raises(DeltaFormatError, match="no delta_config"):
        ExpertDelta.from_pretrained(folder)


def test_weights_of_another_base_beside_the_manifest_are_refused(folder: Path, base: Any, tmp_path: Path) -> None:
    other = compress_expert(tuned(base, 5), tuned(base, 1), DeltaConfig(num_salient=2))
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(DeltaFormatError, match="different bases"):
        ExpertDelta.from_pretrained(folder)


def test_files_have_the_mode_that_new_files_get(folder: Path) -> None:
    (folder / "plain").touch()
    wanted = (folder / "plain").stat().st_mode
    assert {file.name: file.stat().st_mode for file in folder.iterdir()} == dict.fromkeys(
        (file.name for file in folder.iterdir()), wanted
    )
