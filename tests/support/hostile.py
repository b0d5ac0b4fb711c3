"""Hostile inputs by name: folders, files and places that no command may trip over. Each maker gets an empty folder."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tersor import zoo

#: Copies of a checkpoint's folder with other fields in its config.json, by what is wrong with them.
FIELDS: dict[str, dict[str, Any]] = {
    "no heads": {"num_attention_heads": 0},
    "heads that do not divide": {"num_attention_heads": 7},
    "negative heads": {"num_attention_heads": -4},
    "heads in words": {"num_attention_heads": "four"},
    "true heads": {"num_attention_heads": True},
    "a list of heads": {"num_attention_heads": [4]},
    "more heads than channels": {"num_attention_heads": 10**12},
    "layers in words": {"num_hidden_layers": "eight"},
    "no layers": {"num_hidden_layers": 0},
    "half a layer": {"num_hidden_layers": 8.5},
    "absurd layers": {"num_hidden_layers": 10**12},
    "layers that no file holds": {"num_hidden_layers": 5000},
    "absurd width": {"hidden_size": 10**12},
    "negative width": {"hidden_size": -64},
    "a width as an object": {"hidden_size": {}},
    "absurd vocabulary": {"vocab_size": 10**12},
    "no vocabulary": {"vocab_size": 0},
    "pairs that do not divide": {"num_key_value_heads": 3},
    "pairs in words": {"num_key_value_heads": "two"},
    "an epsilon in words": {"rms_norm_eps": "small"},
    "an epsilon that is no number": {"rms_norm_eps": float("nan")},
    "a negative epsilon": {"rms_norm_eps": -1.0},
    "classes as numbers": {"architectures": 7},
}
#: The same for models of images.
IMAGE_FIELDS: dict[str, dict[str, Any]] = {
    "absurd classes": {"num_classes": 10**12},
    "classes in words": {"num_classes": "ten"},
    "negative classes": {"num_classes": -1},
    "an absurd grid": {"grid_size": [10**6, 10**6]},
    "an empty grid": {"grid_size": []},
    "a grid in words": {"grid_size": "14x14"},
    "a grid of none": {"grid_size": [0, 14]},
    "no prefix": {"condition_tokens": 0},
}
TOKENIZER_FIELDS: dict[str, dict[str, Any]] = {
    "an absurd codebook": {"codebook_size": 10**12},
    "a codebook in words": {"codebook_size": "many"},
    "absurd patches": {"patch_size": 10**9},
    "no channels": {"channels": 0},
}


def variant(name: str, folder: Path, fields: dict[str, Any], *, inside: str = "") -> Path:
    """A zoo model in ``folder`` with other fields in the config.json of its sub-folder ``inside``."""
    shutil.copytree(zoo.path(name), folder, copy_function=_link)
    file = folder / inside / "config.json"
    config = json.loads(file.read_text())
    file.unlink()
    file.write_text(json.dumps({**config, **fields}))
    return folder


def _link(source: str, target: str) -> None:
    Path(target).symlink_to(source)


def _rewrite(folder: Path, name: str, content: bytes | None) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)


def _tensors(change: Callable[[dict[str, Any], str], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        state = load_file(file)
        change(state, sorted(name for name, each in state.items() if each.ndim == 2)[-1])
        file.unlink()
        save_file(state, file, metadata={"format": "pt"})

    return damage


def _nan(state: dict[str, Any], name: str) -> None:
    state[name] = state[name].clone()
    state[name].view(-1)[0] = float("nan")


def _infinite(state: dict[str, Any], name: str) -> None:
    state[name] = state[name].clone()
    state[name].view(-1)[-1] = float("-inf")


def _other_shape(state: dict[str, Any], name: str) -> None:
    state[name] = state[name][:3, :3].clone()


def _whole(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


#: What can be wrong with a checkpoint's folder -> what does it to a good one.
DAMAGE: dict[str, Callable[[Path], None]] = {
    "an empty config": lambda folder: _rewrite(folder, "config.json", b""),
    "a list as config": lambda folder: _rewrite(folder, "config.json", b"[]"),
    "a word as config": lambda folder: _rewrite(folder, "config.json", b'"Llama"'),
    "a deep config": lambda folder: _rewrite(folder, "config.json", b"[" * 100_000),
    "a binary config": lambda folder: _rewrite(folder, "config.json", b"\xff\xfe\x00\x01"),
    "no config": lambda folder: _rewrite(folder, "config.json", None),
    "empty weights": lambda folder: _rewrite(folder, "model.safetensors", b""),
    "zeros as weights": lambda folder: _rewrite(folder, "model.safetensors", bytes(4096)),
    "weights cut off": lambda folder: _rewrite(folder, "model.safetensors", _whole(folder)[:-1000]),
    "weights with more behind": lambda folder: _rewrite(folder, "model.safetensors", _whole(folder) + b"more"),
    "an absurd header": lambda folder: _rewrite(folder, "model.safetensors", b"\xff" * 8 + b"{}"),
    "a list as header": lambda folder: _rewrite(folder, "model.safetensors", struct.pack("<Q", 2) + b"[]"),
    "no tensors": lambda folder: _rewrite(folder, "model.safetensors", struct.pack("<Q", 2) + b"{}"),
    "no weights": lambda folder: _rewrite(folder, "model.safetensors", None),
    "an index that leads away": lambda folder: _index(folder, "../model.safetensors"),
    "an index of nothing": lambda folder: _index(folder, "model-00001-of-00002.safetensors"),
    "NaN": _tensors(_nan),
    "infinity": _tensors(_infinite),
    "a missing tensor": _tensors(lambda state, name: state.pop(name)),
    "another shape": _tensors(_other_shape),
}


def _index(folder: Path, file: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))


def damaged(name: str, folder: Path, what: str) -> Path:
    """A zoo model in ``folder``, damaged as ``what`` of `DAMAGE` says."""
    DAMAGE[what](variant(name, folder, {}))
    return folder


def png(width: int, height: int, content: bytes) -> bytes:
    """A grey PNG of this size by its header, whatever ``content`` it unpacks to."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(content)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


#: Files that are no pictures, though they are called so.
PICTURES: dict[str, Callable[[Path], None]] = {
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(1000)),
    "text": lambda file: file.write_text("no picture"),
    "cut off": lambda file: file.write_bytes(png(40, 40, bytes(41 * 40))[:45]),
    "too little in it": lambda file: file.write_bytes(png(40, 40, b"abc")),
    "a bomb": lambda file: file.write_bytes(png(20_000, 20_000, bytes(1000))),
    "half a bomb": lambda file: file.write_bytes(png(10_000, 10_000, bytes(1000))),
    "a link to itself": lambda file: file.symlink_to(file),
    "a link to nowhere": lambda file: file.symlink_to(file.with_name("nothing")),
    "a folder": lambda file: file.mkdir(),
}


#: Files that hold nothing a command can read.
FILES: dict[str, Callable[[Path], None]] = {
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(1000)),
    "binary": lambda file: file.write_bytes(b"\xff\xfe\x00\x80" * 50),
    "a link to itself": lambda file: file.symlink_to(file),
    "a folder": lambda file: file.mkdir(),
}


def _over_a_file(folder: Path) -> Path:
    (folder / "file").write_text("here")
    return folder / "file" / "below" / "it"


def _loop(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop" / "it"


#: Places that no file or folder can be written to.
PLACES: dict[str, Callable[[Path], Path]] = {
    "below a file": _over_a_file,
    "below a loop": _loop,
    "a name too long": lambda folder: folder / ("ü" * 200),
    "no file system": lambda folder: Path("/proc/nothing/it"),
}
