"""The GPU script runs on a CPU with small shapes: same code, no statement about speed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tersor.bench.records import read_jsonl
from tersor.grids.model import LlamaGen, LlamaGenConfig

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--device", "cpu", "--dtype", "float32", "--layers", "1", "--hidden", "32", "--grid", "4x4", "--repeats", "1"]


@pytest.fixture(scope="module")
def nar_gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nar_gpu", ROOT / "benchmarks" / "nar_gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nar_gpu"] = module
    spec.loader.exec_module(module)
    return module


def test_every_way_is_measured(nar_gpu, tmp_path) -> None:
    out = tmp_path / "records.jsonl"
    records = nar_gpu.main([*SMALL, "--batches", "1", "2", "--out", str(out)])
    assert read_jsonl(out) == records and len(records) == 2 * 5
    assert all(record.claim is None and "random weights" in record.shapes for record in records)
    assert [record.item for record in records[:3]] == [
        "NAR, 7 passes, batch 1", "PAR-4X-like, 7 passes, batch 1", "raster, 16 passes, batch 1"
    ]  # fmt: skip


@pytest.mark.parametrize(("grid", "passes"), [((16, 16), 67), ((2, 3), 5), ((4, 4), 7)])
def test_the_parallel_baseline_takes_the_passes_of_its_schedule(nar_gpu, grid, passes) -> None:
    shape = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "grid_size": grid}
    raster, widths = LlamaGen(LlamaGenConfig(**shape)).eval(), []
    raster.layers[0].register_forward_hook(lambda module, args, output: widths.append(args[0].shape[1]))
    assert nar_gpu.par_like(raster, torch.tensor([1]), torch.Generator().manual_seed(0)) == passes
    assert widths == [1] * 4 + [4] * (passes - 4), "16 by 16: the paper's 67 passes"


@pytest.mark.parametrize("arguments", [["--grid", "16"], ["--hidden", "30"], ["--batches", "0"]])
def test_bad_arguments(nar_gpu, arguments) -> None:
    with pytest.raises(SystemExit):
        nar_gpu.main(arguments)
