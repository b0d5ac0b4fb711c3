"""Bad checkpoints are named before anything heavy is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tersor import zoo
from tersor.zoo import loading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "checkpoint"
    shutil.copytree(zoo.path("tiny-lm"), target)
    return target


def rewrite(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def index_outside(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))


def index_missing(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "wrong class": (lambda f: rewrite(f / "config.json", architectures=["BertModel"]), "BertModel does not generate"),
    "no class": (lambda f: rewrite(f / "config.json", architectures=None), "names no architecture"),
    "encoder-decoder": (lambda f: rewrite(f / "config.json", is_encoder_decoder=True), "encoder-decoder"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no \\*.safetensors"),
    "weights cut off": (truncate, "its header says"),
    "weights are text": (lambda f: (f / "model.safetensors").write_text("x" * 99), "is cut off"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "is cut off"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
    "index points outside": (index_outside, "outside its folder"),
    "shards missing": (index_missing, "1 of 1 weight files are missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_named(folder: Path, name: str) -> None:
    loading.check_folder(folder)
    damage, message = BROKEN[name]
    damage(folder)
    with pytest.raises(ValueError, match=message):
        loading.resolve(str(folder))


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    for missing in ("/no/such/folder", "./nothing", "a/b/c"):
        with pytest.raises(ValueError, match="no such folder"):
            loading.resolve(missing)
    with pytest.raises(ValueError, match="not in the local hub cache"):
        loading.resolve("nobody/nothing")
    file = tmp_path / "model.bin"
    file.touch()
    with pytest.raises(ValueError, match="is a file"):
        loading.resolve(str(file))


def test_zoo_names_and_folders_resolve(folder: Path) -> None:
    assert loading.resolve("tiny-lm") == str(zoo.path("tiny-lm"))
    assert loading.resolve(str(folder)) == str(folder)
    assert not loading.is_multimodal(str(folder))
    rewrite(folder / "config.json", architectures=["Qwen2_5_VLForConditionalGeneration"])
    assert loading.is_multimodal(str(folder))


def test_a_checkpoint_whose_weights_do_not_fit_is_one_line(folder: Path) -> None:
    rewrite(folder / "config.json", hidden_size=64, head_dim=16)
    with pytest.raises(ValueError, match="cannot be loaded"):
        loading.load(loading.resolve(str(folder)), "cpu")
    with pytest.raises(ValueError, match="no torch device"):
        loading.load(str(folder), "abacus")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loading.target_device("auto") == loading.target_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda:1: there is no CUDA device here"):
        loading.target_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loading.target_device("auto") == torch.device("cuda")


def test_looking_loads_no_torch(folder: Path) -> None:
    program = (
        "import sys; from tersor.zoo import loading; "
        f"loading.resolve({str(folder)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
