"""Hostile input, command by command: exit code 2, one line that says what to do, at once, and nothing is left.

A row is what is wrong, and the arguments: ``{in}`` is a folder for the input, ``{out}`` one for the output.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import (
    DAMAGE,
    FIELDS,
    FILES,
    IMAGE_FIELDS,
    PICTURES,
    PLACES,
    TOKENIZER_FIELDS,
    damaged,
    png,
    variant,
)

from tersor import zoo
from tersor.cli import run

#: Seconds that any refusal may take, once the libraries are imported.
PATIENCE = 2.0

LM = str(zoo.path("tiny-lm"))
ZIPR1 = ["train", "zipr1", "--model", "tiny-vlm-small"]
VLM = ["generate", "--model", "tiny-vlm-small", "--cache", "zipvl", "--max-new-tokens", "2", "hi"]
GENERATE = ["generate", "--max-new-tokens", "2", "hi"]
#: A command that reads a checkpoint -> the zoo's model that it reads, and its arguments.
READERS = {
    "generate": ("tiny-lm", ["generate", "--model", "{in}/it", "--max-new-tokens", "2", "hi"]),
    "vision": ("tiny-vlm-small", ["generate", "--model", "{in}/it", "--max-new-tokens", "2", "hi"]),
    "raster": ("tiny-raster", ["images", "generate", "--model", "{in}/it", "-n", "1", "--out", "{out}/a.png"]),
    "nar": ("tiny-nar", ["images", "generate", "--model", "{in}/it", "-n", "1", "--out", "{out}/a.png"]),
    "pack": ("tiny-lm", ["experts", "pack", "--base", LM, "--expert", "e={in}/it", "--out", "{out}/bank"]),
}
#: Commands that write, with ``{place}`` for where.
WRITERS = {
    "schedule": ["images", "schedule", "--grid", "4x4", "--window", "2", "--out", "{place}.svg"],
    "images": ["images", "generate", "-n", "1", "--out", "{place}.png"],
    "clips": ["images", "generate", "--model", "tiny-nar-video", "-n", "1", "--out", "{place}.gif"],
    "tokens": ["train", "tokens", "--images", "{in}", "--out", "{place}.safetensors"],
    "quantize": ["quantize", "--model", "tiny-repvgg", "--calibration", "{in}", "--out", "{place}.onnx"],
    "pack": ["experts", "pack", "--base", LM, "--expert", f"e={LM}", "--out", "{place}"],
    "merge": ["experts", "merge", "{in}", "--base", LM, "--out", "{place}"],
    "router": [
        *("experts", "router", "train", "--data", "{in}/d", "--expert", "a=b", "--expert", "c=d"),
        *("--out", "{place}"),
    ],
    "train": ["train", "nar", "--tokens", "{in}/t", "--steps", "1", "--out", "{place}"],
    "zipr1": [*ZIPR1, "--data", "{in}/d", "--out", "{place}"],
    "demo": ["demo", "--only", "zipcache", "--out", "{place}"],
    "bench kv": ["bench", "kv", "--out", "{place}.jsonl"],
    "bench ptq": ["bench", "ptq", "--data", "{in}", "--out", "{place}.jsonl"],
}
#: Options that are numbers, with what makes them absurd.
NUMBERS = {
    "temperature": (GENERATE, ("nan", "inf", "-inf", "-1", "warm")),
    "max-new-tokens": (GENERATE, ("0", "-1", "1e3", "99999999999999999999", "1000000")),
    "seed": (GENERATE, ("9" * 30, "pi")),
    "set": (
        [*GENERATE, "--cache", "minicache"],
        ("start_layer=inf", "start_layer=nan", "t=nan", "nothing=1", "start_layer", "gamma=1e999", "t=2"),
    ),
    "saliency-ratio": (GENERATE, ("nan", "inf", "-1", "1e999", "many", "2")),
    "no-such-setting": (GENERATE, ("1",)),
    "high-bits": (GENERATE, ("5", "-1", "inf", "9" * 30)),
    "skip-layers": ([*GENERATE, "--cache", "zipvl"], ("all", "inf", "0.5")),
    "tau": ([*GENERATE, "--cache", "zipvl"], ("nan", "0", "2", "inf")),
    "guidance-scale": (["images", "generate", "--out", "{out}/a.png"], ("nan", "inf", "-1")),
    "top-k": (["images", "generate", "--out", "{out}/a.png"], ("-1", "9" * 30)),
    "count": (["images", "generate", "--out", "{out}/a.png"], ("0", "-1", "9" * 30)),
    "labels": (["images", "generate", "--out", "{out}/a.png"], ("", "99", "-1", "a", "1,,2", "9" * 30)),
    "window": (["images", "generate", "--out", "{out}/a.png"], ("0", "-3", "wide", "nan")),
    "grid": (["images", "schedule"], ("0x4", "-1x4", "4", "axb", "99999999x99999999", "9" * 30 + "x1")),
    "bits": (["experts", "pack", "--base", LM, "--expert", f"e={LM}", "--out", "{out}/b"], ("5", "0", "-2", "two")),
    "salient": (["experts", "pack", "--base", LM, "--expert", f"e={LM}", "--out", "{out}/b"], ("-1", "9" * 30)),
    "learning-rate": (["train", "nar", "--tokens", "{in}/t", "--steps", "1", "--out", "{out}/r"], ("nan", "inf", "-1")),
    "threshold": (
        ["experts", "router", "train", "--data", "{in}/d", "--expert", "a=b", "--expert", "c=d", "--out", "{out}/r"],
        ("nan", "inf", "2", "-0.5"),
    ),
}
for name, wrong in {
    "beta": ("nan", "inf"), "efficiency-weight": ("nan", "-1"), "lora": ("-1", "9" * 30), "questions": ("0", "many"),
    "thresholds": ("", "nan,nan", "0.9", "0.9,0.8", "0.5,2", "a,b"), "eval-threshold": ("nan", "0", "2"),
    "held-out": ("0", "-1"), "min-tokens": ("-1", "few"), "verifier": ("", "none", "number:2", "os:none"),
}.items():  # fmt: skip
    NUMBERS[name] = ([*ZIPR1, "--data", "{in}/d", "--out", "{out}/r"], wrong)
#: Everything else, one by one.
SINGLE = {
    "generate: no folder": ["generate", "--model", "{in}/nothing", "hi"],
    "generate: a file": ["generate", "--model", __file__, "hi"],
    "generate: an empty folder": ["generate", "--model", "{in}", "hi"],
    "generate: a name too long": ["generate", "--model", "/" + "x" * 5000, "hi"],
    "generate: a name in Unicode": ["generate", "--model", "./žluťoučký kůň", "hi"],
    "generate: an empty name": ["generate", "--model", "", "hi"],
    "generate: a folder as prompt": ["generate", "--prompt-file", "{in}"],
    "generate: an empty prompt": ["generate", ""],
    "generate: unknown cache": ["generate", "--cache", "zipcache+zipcash", "hi"],
    "generate: the same twice": ["generate", "--cache", "zipcache+zipcache", "hi"],
    "generate: unknown device": ["generate", "--device", "cpu:x", "hi"],
    "generate: a picture for a text model": ["generate", "--image", str(zoo.photos()[0]), "hi"],
    "generate: a video for a text model": ["generate", "--video", "{in}", "hi"],
    "generate: a template that is not there": ["generate", "--chat", "hi"],
    "generate: a film": [*VLM, "--video", __file__],
    "generate: a folder without frames": [*VLM, "--video", "{in}"],
    "generate: a video that is not there": [*VLM, "--video", "{in}/no.gif"],
    "generate: two settings alike": [*GENERATE, "--high-bits", "8", "--set", "high_bits=8"],
    "images: an empty folder": ["images", "generate", "--model", "{in}", "--out", "{out}/a.png"],
    "images: a model of text": ["images", "generate", "--model", "tiny-lm", "--out", "{out}/a.png"],
    "images: another ending": ["images", "generate", "--out", "{out}/a.jpg"],
    "images: a method of another": ["images", "generate", "--method", "nar", "--out", "{out}/a.png"],
    "schedule: another ending": ["images", "schedule", "--out", "{out}/a.txt"],
    "tokens: no folder": ["train", "tokens", "--images", "{in}/no", "--out", "{out}/t.safetensors"],
    "tokens: an empty folder": ["train", "tokens", "--images", "{in}", "--out", "{out}/t.safetensors"],
    "tokens: negative depth": ["train", "tokens", "--images", "{in}", "--depth", "-1"],
    "zipr1: no data": [*ZIPR1, "--data", "{in}/no.jsonl", "--out", "{out}/r"],
    "zipr1: an empty folder": [*ZIPR1, "--data", "{in}", "--out", "{out}/r"],
    "zipr1: other data": [*ZIPR1, "--data", f"{LM}/model.safetensors", "--out", "{out}/r"],
    "zipr1: a model of text": ["train", "zipr1", "--model", "tiny-lm", "--data", "{in}/d", "--out", "{out}/r"],
    "zipr1: another objective": [*ZIPR1, "--objective", "reward", "--data", "{in}/d", "--out", "{out}/r"],
    "train: no tokens": ["train", "nar", "--tokens", "{in}/no", "--steps", "1", "--out", "{out}/r"],
    "train: a folder of tokens": ["train", "nar", "--tokens", "{in}", "--steps", "1", "--out", "{out}/r"],
    "train: other tokens": ["train", "nar", "--tokens", f"{LM}/model.safetensors", "--steps", "1", "--out", "{out}/r"],
    "train: no steps": ["train", "nar", "--tokens", "{in}/no", "--steps", "0", "--out", "{out}/r"],
    "quantize: no folder": ["quantize", "--model", "tiny-repvgg", "--calibration", "{in}/x", "--out", "{out}/a.onnx"],
    "quantize: an empty folder": [
        "quantize",
        "--model",
        "tiny-repvgg",
        "--calibration",
        "{in}",
        "--out",
        "{out}/a.onnx",
    ],
    "quantize: bits": [
        *("quantize", "--model", "tiny-repvgg", "--calibration", "{in}", "--bits", "w0a8", "--out", "{out}/a.onnx"),
    ],
    "pack: no base": ["experts", "pack", "--base", "{in}/no", "--expert", f"e={LM}", "--out", "{out}/b"],
    "pack: a name that leads away": ["experts", "pack", "--base", LM, "--expert", f"../e={LM}", "--out", "{out}/b"],
    "pack: no name": ["experts", "pack", "--base", LM, "--expert", LM, "--out", "{out}/b"],
    "pack: no calibration": [
        *("experts", "pack", "--base", LM, "--expert", f"e={LM}", "--calibration", "e={in}/no", "--out", "{out}/b"),
    ],
    "inspect: no folder": ["experts", "inspect", "{in}/no"],
    "inspect: an empty folder": ["experts", "inspect", "{in}"],
    "inspect: a checkpoint": ["experts", "inspect", LM],
    "verify: no delta": ["experts", "verify", "{in}", "--base", LM, "--expert", LM],
    "merge: no delta": ["experts", "merge", "{in}", "--base", LM, "--out", "{out}/m"],
    "router: no data": [
        *("experts", "router", "train", "--data", "{in}/no", "--expert", "a=b", "--expert", "c=d", "--out", "{out}/r"),
    ],
    "router: one expert": ["experts", "router", "train", "--data", "{in}", "--expert", "a=b", "--out", "{out}/r"],
    "router: no folder": ["experts", "router", "eval", "{in}/no", "--data", "{in}/no"],
    "bench: no text": ["bench", "kv", "--text", "{in}/no"],
    "bench: no photos": ["bench", "photos", "--images", "{in}"],
    "bench: no data": ["bench", "ptq", "--data", "{in}"],
    "demo: unknown": ["demo", "--only", "nothing", "--out", "{out}/r"],
    "nothing: unknown command": ["compress"],
}


def nothing(folder: Path) -> None:
    """No input is made."""


def picture_rows() -> dict[str, tuple[list[str], Callable[[Path], object]]]:
    commands = {
        "ask": [*VLM, "--image", "{in}/a.png"],
        "frames": [*VLM, "--video", "{in}/a.png"],
        "tokens": ["train", "tokens", "--images", "{in}", "--out", "{out}/t.safetensors"],
        "calibration": ["quantize", "--model", "tiny-repvgg", "--calibration", "{in}", "--out", "{out}/a.onnx"],
    }
    return {
        f"{who}: a picture that is {what}": (arguments, lambda folder, make=make: make(folder / "a.png"))
        for who, arguments in commands.items()
        for what, make in PICTURES.items()
        if (who, what) != ("frames", "a folder")  # a folder of frames is one: it holds none
    }


def rows() -> dict[str, tuple[list[str], Callable[[Path], object]]]:
    """Every case: arguments, and what makes the input in a folder."""
    found = picture_rows()
    for who, (model, arguments) in READERS.items():
        fields = FIELDS if who != "vision" else {"a list for an object": {"text_config": []}}
        fields = {**fields, **(IMAGE_FIELDS if who in ("raster", "nar") else {})}
        for what, changed in fields.items():
            found[f"{who}: {what}"] = (arguments, lambda at, m=model, c=changed: variant(m, at / "it", c))
        for what in DAMAGE:
            found[f"{who}: {what}"] = (arguments, lambda at, m=model, w=what: damaged(m, at / "it", w))
        if who in ("raster", "nar"):
            for what, changed in TOKENIZER_FIELDS.items():
                found[f"{who}: {what}"] = (
                    arguments,
                    lambda at, m=model, c=changed: variant(m, at / "it", c, inside="tokenizer"),
                )
    for option, (arguments, values) in NUMBERS.items():
        for value in values:
            found[f"{arguments[0]} --{option} {value}"] = ([*arguments, f"--{option}={value}"], nothing)
    for what, arguments in SINGLE.items():
        found[what] = (arguments, nothing)
    return found


def file_rows() -> dict[str, tuple[list[str], Callable[[Path], object]]]:
    """Commands that read a file of another kind: tokens, requests, arrays, texts."""
    two = ["--expert", "a=b", "--expert", "c=d"]
    commands = {
        "token file": ["train", "nar", "--tokens", "{in}/it", "--steps", "1", "--out", "{out}/r"],
        "requests": ["experts", "router", "train", "--data", "{in}/it", *two, "--model", LM, "--out", "{out}/r"],
        "arrays": ["train", "tokens", "--images", "{in}/it.npz", "--out", "{out}/t.safetensors"],
        "texts": [
            *("experts", "pack", "--base", LM, "--expert", f"e={LM}", "--calibration", "e={in}/it"),
            *("--out", "{out}/b"),
        ],
        "prompt": ["generate", "--prompt-file", "{in}/it"],
        "delta": ["experts", "inspect", "{in}"],
        "router": ["experts", "router", "eval", "{in}", "--data", "{in}/it"],
    }
    names = {"arrays": "it.npz", "delta": "delta_config.json", "router": "router.json"}
    return {
        f"{who}: a file that is {what}": (arguments, lambda at, m=make, n=name: m(at / n))
        for who, arguments in commands.items()
        for name in [names.get(who, "it")]
        for what, make in FILES.items()
        if who not in ("prompt", "texts") or what != "zeros"  # they are text, if odd
    }


ROWS = rows() | file_rows()
PLACED = [(who, what) for who in WRITERS for what in [*PLACES, "of the other kind"]]


@pytest.fixture(scope="session", autouse=True)
def _libraries() -> None:
    """What the first command of a process imports is not what a refusal takes."""
    run(
        [
            "generate",
            "--model",
            "tiny-vlm-small",
            "--image",
            str(zoo.photos()[0]),
            "--max-new-tokens",
            "1",
            "--json",
            "hi",
        ]
    )
    run(["images", "generate", "--model", "tiny-lm"])
    run(["train", "nar", "--tokens", "/no", "--steps", "1", "--out", "/tmp/no"])
    run(["quantize", "--model", "tiny-repvgg", "--calibration", "/no", "--out", "/no/a.onnx"])


def refuse(arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must refuse; what it says."""
    before = sorted(out.rglob("*"))
    capsys.readouterr()
    start = time.perf_counter()
    code = run(arguments)
    seconds = time.perf_counter() - start
    said = capsys.readouterr()
    assert (code, said.out) == (2, ""), said.err
    lines = said.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("tersor: "), said.err
    assert "Traceback" not in lines[0] and ".tmp" not in lines[0]
    assert sorted(out.rglob("*")) == before
    assert seconds < PATIENCE, lines[0]
    return lines[0]


def test_there_are_at_least_two_hundred() -> None:
    assert len(ROWS) + len(PLACED) >= 200


@pytest.mark.parametrize("row", ROWS)
def test_a_hostile_input_is_refused_in_one_line(
    row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, make = ROWS[row]
    given, out = tmp_path / "in", tmp_path / "out"
    given.mkdir()
    out.mkdir()
    make(given)
    monkeypatch.chdir(out)  # where a default --out would go
    refuse([each.replace("{in}", str(given)).replace("{out}", str(out)) for each in arguments], out, capsys)


@pytest.mark.parametrize(("who", "what"), PLACED)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    who: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = tmp_path / "in", tmp_path / "out"
    given.mkdir()
    out.mkdir()
    (given / "a.png").write_bytes(png(32, 32, bytes(33 * 32)))
    template = WRITERS[who][-1]
    if what == "of the other kind":
        at = Path(template.replace("{place}", str(out / "it")))
        at.mkdir() if at.suffix else at.write_text("here")
        place = out / "it"
    else:
        place = PLACES[what](out)
    arguments = [each.replace("{in}", str(given)).replace("{place}", str(place)) for each in WRITERS[who]]
    assert "--out" in refuse(arguments, out, capsys)
