"""The benchmarks of ZipVL run with tiny sizes, and its example with a tiny model in the checkpoint's place."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from tiny_models import build, question

from tersor.bench.records import read_jsonl

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _same_threads():
    """The scripts set the number of threads for themselves."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_cpu_benchmark_times_both_and_realises_the_ratio(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    arguments = ["--lengths", "256", "--repeats", "3", "--threads", "1", "--out", str(out)]
    records = script("zipvl_cpu").main(arguments)
    assert read_jsonl(out) == records
    assert sum(record.quantity == "time" for record in records) == 4
    ratio = next(record.measured for record in records if record.quantity == "kept tokens")
    assert ratio == pytest.approx(0.4, abs=0.05)
    speedup = next(record for record in records if record.quantity.startswith("speed-up over dense"))
    assert speedup.measured > 0
    assert speedup.claim is None  # which is about long prompts


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "records.jsonl"
    module = script("zipvl_gpu")
    small = ["--device", "cpu", "--layers", "1", "--hidden", "64", "--steps", "2", "--repeats", "2"]
    records = module.main([*small, "--lengths", "300", "--shares", "0.421", "--out", str(out)])
    assert read_jsonl(out) == records
    sizes = {record.item: record.measured for record in records if record.quantity == "cache memory"}
    dense, sparse = sizes[f"{module.DENSE}: 300 tokens"], sizes[f"{module.name_of(0.421)}: 300 tokens"]
    assert sparse == pytest.approx(0.43 * dense, rel=0.1)
    assert all(record.claim is None for record in records)
    assert "42.1%" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        module.main([*small, "--shares", "1.5"])


def test_the_example_prints_an_answer_and_what_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = build("qwen2_5_vl")

    class Batch(dict):
        def to(self, device):
            return self

    class Processor:
        def apply_chat_template(self, messages, **kwargs):
            return messages[0]["content"][1]["text"]

        def __call__(self, text, images, return_tensors):
            return Batch(question(net, words=250))

        def decode(self, ids, **kwargs):
            return f"answer of {len(ids)} tokens to"

    picture = tmp_path / "pic.png"
    Image.new("RGB", (28, 28)).save(picture)
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda name: Processor())
    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", lambda name, **kwargs: net)
    monkeypatch.setattr(sys, "argv", ["zipvl_qwen.py", str(picture), "What?", "--tau", "0.9", "--max-new-tokens", "6"])
    runpy.run_path(str(ROOT / "examples" / "zipvl_qwen.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "answer of 6 tokens" in printed
    assert "of 279 tokens took part" in printed
    assert "MiB instead of" in printed
