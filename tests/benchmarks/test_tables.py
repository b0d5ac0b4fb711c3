"""Benchmarks of large shapes run on a CPU with small ones: same code, no statement about speed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tersor.bench.measure import Estimate
from tersor.bench.records import read_jsonl

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--device", "cpu", "--layers", "1", "--hidden", "64", "--batches", "1", "--steps", "2", "--repeats", "2"]


def load(name: str) -> ModuleType:
    """A script of the benchmarks as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kv_gpu() -> ModuleType:
    return load("kv_gpu")


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no cell of a table is wrapped."""
    monkeypatch.setenv("COLUMNS", "200")


def test_kv_gpu_measures_every_cache(kv_gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "records.jsonl"
    records = kv_gpu.main([*SMALL, "--lengths", "96", "--out", str(out)])
    assert read_jsonl(out) == records
    latencies = [record for record in records if record.quantity == "prefill latency"]
    assert len(latencies) == 4
    assert all(record.measured > 0 and record.n == 2 for record in latencies)
    sizes = {record.item.partition(":")[0]: record.measured for record in records if record.quantity == "cache memory"}
    assert sizes[kv_gpu.OURS] == pytest.approx(sizes[kv_gpu.MIKV], rel=0.05)
    assert sizes[kv_gpu.OURS] < sizes[kv_gpu.FULL] / 4  # the model is float32 here
    # No claim is judged on a CPU, but the published figures stand in the table.
    assert all(record.claim is None for record in records)
    printed = capsys.readouterr().out
    assert "-37.3 %" in printed
    assert "-56.9 %" in printed
    assert "-19.8 %" in printed


def test_what_does_not_fit_is_shown(
    kv_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_once = kv_gpu.run_once

    def run(model: Any, method: Any, *rest: Any) -> Any:
        if method.name in (kv_gpu.MIKV, kv_gpu.FULL):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_once(model, method, *rest)

    monkeypatch.setattr(kv_gpu, "run_once", run)
    records = kv_gpu.main([*SMALL, "--lengths", "40"])
    assert capsys.readouterr().out.count("out of memory") == 2
    assert not [record for record in records if kv_gpu.MIKV in record.item or record.baseline is not None]


def test_kv_gpu_scores_are_those_of_the_attention_matrix(kv_gpu: ModuleType) -> None:
    """The MiKV-like method ranks by column sums of the whole matrix, as probing every row does."""
    from tersor.kv.method import KVMethod
    from tersor.kv.selection.ratio import SaliencySelection
    from tersor.kv.storage.mixed import MixedPrecisionStorage

    model = kv_gpu.llama(2, 64, "cpu")
    ids = torch.randint(0, 1000, (1, 60), generator=torch.Generator().manual_seed(0))
    probed = KVMethod(
        selection=SaliencySelection(ratio=0.6, normalization="none", probe_recent_ratio=1.0, probe_random_ratio=0.0),
        storage=MixedPrecisionStorage(),
    )
    positions = []
    for method in (probed, next(each.engine for each in kv_gpu.methods() if each.name == kv_gpu.MIKV)):
        cache = method.cache(model.config)
        with method.on(model), torch.inference_mode():
            model(ids, past_key_values=cache)
        positions.append(cache.layers[0].segments[0].groups[0].positions)
    assert torch.equal(*positions)


def test_a_claim_is_judged_by_its_number(kv_gpu: ModuleType) -> None:
    assert kv_gpu.verdict(Estimate(-60.0, -70.0, -50.0, "95% bootstrap"), -56.9) == "holds"
    assert kv_gpu.verdict(Estimate(-20.0, -30.0, -10.0, "95% bootstrap"), -56.9) == "partly"
    assert kv_gpu.verdict(Estimate(-20.0, -30.0, 10.0, "95% bootstrap"), -56.9) == "fails"


def test_senseless_shapes_are_refused(kv_gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kv_gpu.main([*SMALL, "--lengths", "0"])
    assert "at least 1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def zipar_shapes() -> ModuleType:
    return load("zipar_shapes")


def test_zipar_shapes_extrapolates_what_it_measures(zipar_shapes: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    small = ["--grid", "6x8", "--window", "2", "--layers", "1", "--hidden", "512", "--vocabulary", "50"]
    records = zipar_shapes.main([*small, "--samples", "3", "--repeats", "2", "--dtype", "float32", "--out", str(out)])
    assert read_jsonl(out) == records
    ratio, raster, zipar = records[:3]
    assert all("extrapolated" in record.item for record in (ratio, raster, zipar))
    assert ratio.peer == pytest.approx(6 * 9 / (8 + 5 * 2))
    parts = {name: [each for each in records[3:] if each.item.startswith(name)] for name in ("raster", "zipar")}
    assert [len(each) for each in parts.values()] == [6, 6]
    assert "random weights: 1 of 32 layers" in ratio.shapes
    # Medians of two rounds are means, so the whole follows from the parts: 32 layers and one head, by 54 passes.
    layers = sum(each.measured for each in parts["raster"] if each.quantity.endswith("layers"))
    heads = sum(each.measured for each in parts["raster"] if each.quantity.endswith("head"))
    assert raster.measured == pytest.approx((32 * layers + heads) / 3 * 54 / 1e3)


def test_the_passes_that_are_measured_are_those_of_the_schedule(zipar_shapes: ModuleType) -> None:
    grid = zipar_shapes.RasterGrid(90, 90, end_of_row=True)
    raster, zipar = zipar_shapes.raster_points(grid, 4), zipar_shapes.zipar_points(grid, 7, 4)
    assert [len(each.held) for each in raster] == [1022, 3070, 5117, 7165]
    assert all(len(each.fed) == len(each.keep) == 1 for each in raster)
    assert [len(each.fed) >= 12 for each in zipar] == [True] * 4
    for each in zipar:
        assert not set(each.held) & set(each.fed)
        assert list(each.fed) == sorted(each.fed)
    # The schedule's own account: all cells and the end-of-row tokens between rows are fed, the last cell is not.
    assert len(zipar[-1].held) < 90 * 91 - 1
