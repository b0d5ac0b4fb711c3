"""The files of a folder's weights: one, or the shards of an index that stays inside the folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tersor._weights import fingerprint, weight_files

NAME = "model.safetensors"


def test_without_an_index_it_is_the_one_file(tmp_path: Path) -> None:
    assert weight_files(tmp_path, NAME) == [tmp_path / NAME]
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    assert weight_files(tmp_path, NAME) == [tmp_path / NAME]


def test_shards_come_once_and_in_order(tmp_path: Path) -> None:
    shards = {"a": "part-2.safetensors", "b": "part-1.safetensors", "c": "part-2.safetensors"}
    (tmp_path / f"{NAME}.index.json").write_text(json.dumps({"weight_map": shards}))
    assert weight_files(tmp_path, NAME) == [tmp_path / "part-1.safetensors", tmp_path / "part-2.safetensors"]


@pytest.mark.parametrize("shard", ["../x", "/etc/passwd", "sub/x", "", ".", ".."])
def test_an_index_that_points_outside_is_refused(tmp_path: Path, shard: str) -> None:
    (tmp_path / f"{NAME}.index.json").write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": shard}}))
    with pytest.raises(ValueError, match="points outside its folder"):
        weight_files(tmp_path, NAME)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1, "b": "x"}}', "null"])
def test_an_index_of_another_kind_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / f"{NAME}.index.json").write_text(text)
    with pytest.raises(ValueError, match="is not a weight index; fetch it again"):
        weight_files(tmp_path, NAME)


def test_a_shard_that_is_no_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.index.json").write_text('{"weight_map": {"a": 1}}')
    with pytest.raises(ValueError, match="points outside"):
        weight_files(tmp_path, NAME)


def test_weights_are_known_by_all_of_their_files_and_by_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").write_bytes(b"two")
    (tmp_path / "a.safetensors").write_bytes(b"one")
    before = fingerprint(tmp_path)
    assert before == hashlib.sha256(b"onetwo").hexdigest()
    (tmp_path / "config.json").write_text("{}")
    assert fingerprint(tmp_path) == before
    (tmp_path / "b.safetensors").write_bytes(b"three")
    assert fingerprint(tmp_path) != before
