"""Benchmarks of large shapes run on a CPU with small ones: same code, no statement about speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kv_gpu
import pytest
import torch
import turns

from tersor._compat import with_cache
from tersor.bench.measure import Estimate
from tersor.bench.records import read_jsonl

SMALL = ["--device", "cpu", "--layers", "1", "--hidden", "64", "--batches", "1", "--steps", "2", "--repeats", "2"]


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no cell of a table is wrapped."""
    monkeypatch.setenv("COLUMNS", "200")


def test_kv_gpu_measures_every_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "records.jsonl"
    # Long enough that the window of new tokens, made as a whole, is a small part of the cache.
    records = kv_gpu.main([*SMALL, "--lengths", "2048", "--out", str(out)])
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


def test_what_does_not_fit_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_once = turns.run_once

    def run(model: Any, method: Any, *rest: Any) -> Any:
        if method.name in (kv_gpu.MIKV, kv_gpu.FULL):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_once(model, method, *rest)

    monkeypatch.setattr(turns, "run_once", run)
    records = kv_gpu.main([*SMALL, "--lengths", "40"])
    assert capsys.readouterr().out.count("out of memory") == 2
    assert not [record for record in records if kv_gpu.MIKV in record.item or record.baseline is not None]


def test_kv_gpu_scores_are_those_of_the_attention_matrix() -> None:
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
    for method in (probed, next(each.engine for each in kv_gpu.alternatives() if each.name == kv_gpu.MIKV)):
        cache = method.cache(model.config)
        with method.on(model), torch.inference_mode():
            model(ids, **with_cache(cache))
        positions.append(cache.layers[0].segments[0].groups[0].positions)
    assert torch.equal(*positions)


def test_a_claim_is_judged_by_its_number() -> None:
    assert kv_gpu.verdict(Estimate(-60.0, -70.0, -50.0, "95% bootstrap"), -56.9) == "holds"
    assert kv_gpu.verdict(Estimate(-20.0, -30.0, -10.0, "95% bootstrap"), -56.9) == "partly"
    assert kv_gpu.verdict(Estimate(-20.0, -30.0, 10.0, "95% bootstrap"), -56.9) == "fails"


def test_senseless_shapes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kv_gpu.main([*SMALL, "--lengths", "0"])
    assert "at least 1" in capsys.readouterr().err
