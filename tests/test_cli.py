"""The command line's contract: help, JSON, and bad input as one line with exit code 2."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path

import pytest
from typer.main import get_command

from tersor import __version__, zoo
from tersor._errors import TersorError
from tersor.cli import app, run
from tersor.lowbit.kernels import KERNELS

GENERATE = ["generate", "--max-new-tokens", "8"]


def commands(group=None, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command, found in the app itself, so that a new one cannot be left out."""
    group = group or get_command(app)
    found = []
    for name, command in group.commands.items():
        found += commands(command, (*prefix, name)) if hasattr(command, "commands") else [(*prefix, name)]
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_help_names_every_option(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--json" in text
    assert "Usage:" in text


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_unknown_options_exit_with_two(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, "--no-such-option"]) == 2
    assert_one_line(capsys, "no-such-option")


def assert_one_line(capsys: pytest.CaptureFixture[str], *mentions: str) -> None:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("tersor: ")
    for mention in mentions:
        assert mention in lines[0]


BAD = {
    "bits": (["--set", "high_bits=5", "hello"], "high_bits=5"),
    "ratio": (["--set", "saliency_ratio=1.5", "hello"], "saliency_ratio=1.5"),
    "low above high": (["--set", "high_bits=2", "--set", "low_bits=4", "hello"], "low_bits=4"),
    "cache": (["--cache", "magic", "hello"], "choose one of"),
    "tokens": (["--max-new-tokens", "0", "hello"], "at least 1"),
    "no number": (["--max-new-tokens", "many", "hello"], "--max-new-tokens"),
    "temperature": (["--temperature", "-1", "hello"], "negative"),
    "missing model": (["--model", "/no/such/model", "hello"], "no such folder"),
    "unknown model": (["--model", "nobody/nothing", "hello"], "hub access is off"),
    "two prompts": (["--prompt-file", __file__, "hello"], "not both"),
    "no prompt file": (["--prompt-file", "/no/such/file"], "no such file"),
    "empty prompt": ([""], "prompt is empty"),
    "too long": (["--max-new-tokens", "100000", "hello"], "positions"),
    "device": (["--device", "abacus", "hello"], "no torch device"),
}


@pytest.mark.parametrize("name", BAD)
def test_generate_refuses_bad_input(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, mention = BAD[name]
    assert run(["generate", *arguments]) == 2
    assert_one_line(capsys, mention)


def test_generate_refuses_a_binary_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompt"
    file.write_bytes(b"\xff\xfe\x00")
    assert run(["generate", "--prompt-file", str(file)]) == 2
    assert_one_line(capsys, "UTF-8")


def test_generate_streams_text_and_closes_with_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = zoo.book()[:300]
    assert run([*GENERATE, prompt]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert "[zipcache] 307 tokens cached in" in captured.err
    assert "times smaller than in 16 bits" in captured.err


def test_generate_takes_a_file_or_standard_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = zoo.book()[:200]
    file = tmp_path / "prompt.txt"
    file.write_text(prompt)
    answers = []
    for arguments in ([prompt], ["--prompt-file", str(file)], ["-"], []):
        monkeypatch.setattr("sys.stdin", io.StringIO(prompt))
        assert run([*GENERATE, "--json", *arguments]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert all(answer == answers[0] for answer in answers)
    assert answers[0]["prompt_tokens"] == 200
    assert len(answers[0]["text"]) == 8


def test_generate_without_compression(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*GENERATE, "--json", "--cache", "none", "It was a dark and stormy night"]) == 0
    dense = json.loads(capsys.readouterr().out)["cache"]
    assert dense["method"] == "none"
    assert dense["compression_ratio"] == 0.5  # float32 against 16 bits


def test_generate_samples_with_a_seed(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert run([*GENERATE, "--json", "--temperature", "1.0", "--seed", seed, "The old sea-dog "]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != texts[2]


def test_env_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__
    assert run(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kernels"] == dict.fromkeys(KERNELS, "cpu on cpu")
    assert run(["env"]) == 0
    assert "packed_attention: cpu on cpu" in capsys.readouterr().out


def test_demo_refuses_unknown_systems(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--only", "perpetuum-mobile"]) == 2
    assert_one_line(capsys, "zipcache")


@pytest.mark.parametrize("how", ["option", "variable", "no"])
def test_a_fault_is_one_line_and_exit_code_one_and_shows_where_when_asked(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a\nfault of ours")

    monkeypatch.setattr("tersor.bench.measure.machine", broken)
    monkeypatch.setenv("TERSOR_DEBUG", "1" if how == "variable" else "0")
    assert run([*(["--debug"] if how == "option" else []), "env"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("tersor: KeyError: ") and "--debug" in lines[-1]
    assert (len(lines) > 1) == (how != "no") == any("Traceback" in line for line in lines)


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (TersorError("no"), 2, "tersor: no"),
        (ValueError("of a library"), 1, "tersor: ValueError: of a library (tersor --debug … shows where)"),
        (PermissionError(errno.EACCES, "Permission denied", "x.png"), 2, "tersor: x.png: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device", "x.png"), 1, "tersor: x.png: No space left on device"),
        (MemoryError(), 1, "tersor: there is not enough memory for this"),
        (KeyboardInterrupt(), 130, "tersor: interrupted"),
    ],
)
def test_what_is_raised_decides_the_exit_code(
    raised: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr("tersor.bench.measure.machine", fail)
    assert run(["env"]) == code
    assert capsys.readouterr().err == f"{said}\n"


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["--max-new-tokens", "4", "hi"], "nothing is compressed yet"),
        (["--max-new-tokens", "4", "--cache", "none", "hi"], "the library's own cache"),
        (["--max-new-tokens", "4", "--cache", "zipvl", "hi"], "nothing is compressed yet"),
        (["--max-new-tokens", "4", "--cache", "zipvl", "--policy", "keep", "hi"], "nothing is compressed yet"),
    ],
)
def test_a_cache_that_is_no_smaller_is_not_called_smaller(
    arguments: list[str], mention: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", *arguments]) == 0
    said = capsys.readouterr().err
    assert mention in said and "times smaller" not in said


def test_the_comparison_is_with_the_precision_that_the_model_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*GENERATE, "--json", zoo.book()[:600]]) == 0
    cache = json.loads(capsys.readouterr().out)["cache"]
    # Keys and values, 8 layers, 4 heads of 32 channels, in float32.
    config = json.loads((zoo.path("tiny-lm") / "config.json").read_text())
    channels = config["num_key_value_heads"] * config["hidden_size"] // config["num_attention_heads"]
    assert cache["library_bytes"] == 2 * config["num_hidden_layers"] * cache["tokens"] * channels * 4
    assert cache["library_dtype"] == "float32"
    assert 0 < cache["held_bytes"] == cache["cache_bytes"] < cache["library_bytes"]


def test_text_is_printed_although_the_statistics_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("lost")

    monkeypatch.setattr("tersor.kv.engine.cache.CompressedCache.summary", broken)
    assert run([*GENERATE, "It was the best of times"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() and len(said.err.strip().splitlines()) == 1
    assert run([*GENERATE, "--json", "It was the best of times"]) == 0
    assert json.loads(capsys.readouterr().out)["text"].strip() == said.out.strip()


def test_settings_are_options_too(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for setting in (["--set", "saliency_ratio=0.1"], ["--saliency-ratio", "0.1"], ["--saliency-ratio=0.1"]):
        assert run([*GENERATE, *setting, "--json", zoo.book()[:300]]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0] == texts[1] == texts[2]
    assert run(["generate", "--saliency-share", "0.1", "hi"]) == 2
    assert_one_line(capsys, "saliency-share=0.1", "its settings are saliency_ratio")
