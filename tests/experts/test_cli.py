"""`tersor experts` from two folders to a merged checkpoint, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SHAPE
from transformers import LlamaConfig, LlamaForCausalLM
from tuned_models import logits, tuned

from tersor import zoo
from tersor.cli import run
from tersor.experts.compress import compress_expert
from tersor.experts.config import DeltaConfig
from tersor.experts.delta import MANIFEST, ExpertDelta
from tersor.experts.host import merge_expert

pytestmark = pytest.mark.filterwarnings("ignore:no calibration data")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, two experts with a tokenizer, and texts."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = zoo.load("tiny-lm")[1]
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": len(tokenizer)})).eval()
    models = {"base": base, "math": tuned(base, 1), "code": tuned(base, 2)}
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    text = zoo.book()[:6000].replace("\n", " ")
    lines = [text[start : start + 400] for start in range(0, 6000, 400)]
    (root / "calibration.txt").write_text("\n".join(lines[:10]), encoding="utf-8")
    (root / "held-out.txt").write_text("\n".join(lines[10:]), encoding="utf-8")
    return {name: root / name for name in (*models, "calibration.txt", "held-out.txt")}


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """What a command prints with --json."""
    capsys.readouterr()
    assert run(["experts", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def pack(folders: dict[str, Path], out: Path) -> list[object]:
    return [
        *("pack", "--base", folders["base"], "--out", out, "--salient", 2),
        *("--expert", f"math={folders['math']}", "--expert", f"code={folders['code']}"),
        *("--calibration", f"math={folders['calibration.txt']}"),
    ]


def test_from_two_folders_to_a_merged_checkpoint(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = tmp_path / "bank"
    packed = told(capsys, *pack(folders, bank))
    assert sorted(path.name for path in bank.iterdir()) == ["code", "math"]
    math = ExpertDelta.from_pretrained(bank / "math")
    assert packed["math"]["bytes"] == math.nbytes
    assert (bank / "math" / "tokenizer.json").is_file()

    shown = told(capsys, "inspect", bank / "math")
    assert shown["bytes"] == sum(shown["parts"].values())
    assert len(shown["linears"]) == 14
    linear = shown["linears"]["model.layers.0.mlp.down_proj"]
    assert (linear["shape"], linear["bits"], len(linear["salient"])) == ([32, 48], 2, 2)
    # 12 bytes of codes, 2 of step and 4 of salient weights an output, and 8 of indices.
    assert linear["bits_per_weight"] == pytest.approx(8 * (32 * (12 + 2 + 4) + 8) / (32 * 48))

    arguments = ("verify", bank / "math", "--base", folders["base"], "--expert", folders["math"])
    found = told(capsys, *arguments, "--texts", folders["held-out.txt"])
    assert found["errors"] == pytest.approx({n: shown["linears"][n]["error"] for n in shown["linears"]}, rel=1e-4)
    assert 0 < found["kl_low"] <= found["kl"] <= found["kl_high"] < 1
    assert found["texts"] == 5
    eight = compress_expert(folders["base"], folders["math"], DeltaConfig(bits=8, num_salient=0))
    eight.save_pretrained(tmp_path / "eight")
    arguments = ("verify", tmp_path / "eight", "--base", folders["base"], "--expert", folders["math"])
    assert told(capsys, *arguments, "--texts", folders["held-out.txt"])["kl"] < 0.01 * found["kl"]

    told(capsys, "merge", bank / "math", "--base", folders["base"], "--out", tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    base = LlamaForCausalLM.from_pretrained(folders["base"])
    assert torch.equal(logits(merged), logits(merge_expert(base, math)))
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank", "eight", "merged"]


def test_tables_name_every_linear(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*map(str, ["experts", *pack(folders, tmp_path / "bank")])]) == 0
    assert "math: " in capsys.readouterr().out
    assert run(["experts", "inspect", str(tmp_path / "bank" / "code")]) == 0
    assert "model.layers.1.self_attn.o_proj: 32 x 32, " in capsys.readouterr().out
    arguments = ["--base", str(folders["base"]), "--expert", str(folders["code"])]
    assert run(["experts", "verify", str(tmp_path / "bank" / "code"), *arguments]) == 0
    assert "model.layers.1.self_attn.o_proj: error 0." in capsys.readouterr().out


def test_finished_experts_are_not_packed_again(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told(capsys, *pack(folders, tmp_path))
    stamps = {name: (tmp_path / name / MANIFEST).stat().st_mtime_ns for name in ("math", "code")}
    (tmp_path / "code" / MANIFEST).unlink()  # as after a kill while it was written
    told(capsys, *pack(folders, tmp_path))
    assert (tmp_path / "math" / MANIFEST).stat().st_mtime_ns == stamps["math"]
    assert (tmp_path / "code" / MANIFEST).stat().st_mtime_ns != stamps["code"]
    capsys.readouterr()
    assert run([*map(str, ["experts", *pack(folders, tmp_path)]), "--bits", "4"]) == 2
    assert "holds another delta" in capsys.readouterr().err


def test_bad_input_is_one_line(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, math, out = str(folders["base"]), str(folders["math"]), str(tmp_path / "out")
    told(capsys, *pack(folders, tmp_path / "bank"))
    delta = str(tmp_path / "bank" / "math")
    (tmp_path / "empty.txt").write_text("\n\n")
    cases = {
        "must be NAME=PATH": ["pack", "--base", base, "--expert", math, "--out", out],
        "each name once": ["pack", "--base", base, "--expert", f"a={math}", "--expert", f"a={math}", "--out", out],
        "letters, digits": ["pack", "--base", base, "--expert", f"../a={math}", "--out", out],
        "no config.json": ["pack", "--base", base, "--expert", f"a={tmp_path}", "--out", out],
        "--bits 5": ["pack", "--base", base, "--expert", f"a={math}", "--out", out, "--bits", "5"],
        "which no --expert does": [
            "pack",
            "--base",
            base,
            "--expert",
            f"a={math}",
            "--out",
            out,
            "--calibration",
            "b=x",
        ],
        "no such file": ["pack", "--base", base, "--expert", f"a={math}", "--out", out, "--calibration", "a=/none"],
        "no delta_config.json": ["inspect", math],
        "holds no text": ["verify", delta, "--base", base, "--expert", math, "--texts", str(tmp_path / "empty.txt")],
        "is another model": ["verify", delta, "--base", str(folders["code"]), "--expert", math],
        "from another expert": ["verify", delta, "--base", base, "--expert", str(folders["code"])],
        "is not empty": ["merge", delta, "--base", base, "--out", str(tmp_path)],
        "give that base": ["merge", delta, "--base", math, "--out", out],
    }
    for says, arguments in cases.items():
        capsys.readouterr()
        assert run(["experts", *arguments]) == 2, says
        captured = capsys.readouterr()
        assert captured.out == ""
        assert says in captured.err
        assert len(captured.err.strip().splitlines()) == 1
    assert not Path(out).exists()
