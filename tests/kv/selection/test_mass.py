"""The smallest set of tokens that holds the attention mass."""

from __future__ import annotations

import pytest
import torch
from kv_driver import (
    kept_rows,
    prefill,
    uneven,
)
from torch import Tensor

from tersor.kv.selection.base import Waiting
from tersor.kv.selection.mass import MassSelection, smallest_set
from tersor.kv.selection.probes import ProbeScores
from tersor.kv.zipvl import ZipVL


def choose(sums: Tensor, counts: Tensor | None = None, **settings) -> list[list[int]]:
    """Tokens that `MassSelection` picks by the accumulated attention ``[batch, tokens]``."""
    counts = torch.ones_like(sums) if counts is None else counts
    waiting = Waiting(torch.zeros(*sums.shape[:1], 1, sums.shape[1], 1), None, ProbeScores(sums[:, None], counts), 0, 0)
    return [row.tolist() for row in MassSelection(**settings).choose(waiting)[0].index[:, 0]]


def test_the_set_is_the_smallest_that_holds_the_mass() -> None:
    generator = torch.Generator().manual_seed(3)
    sums = torch.rand(20, 77, generator=generator) ** 6
    ordered = sums.double().sort(-1, descending=True).values
    before = torch.zeros(20, dtype=torch.int64)
    for tau in (0.01, 0.3, 0.5, 0.9, 0.96, 0.975, 0.999):
        p = smallest_set(sums, tau)
        needed = tau * ordered.sum(-1)
        for row in range(20):
            assert ordered[row, : p[row]].sum() >= needed[row] * (1 - 1e-12)
            assert ordered[row, : p[row] - 1].sum() < needed[row]
        assert (p >= before).all()
        before = p


@pytest.mark.parametrize("n", [1, 2, 7, 64])
@pytest.mark.parametrize("tau", [0.5, 0.9, 0.975])
def test_uniform_attention_has_harmonic_scores(n: int, tau: float) -> None:
    """Zero queries, every row a probe: A_ij = 1/(i+1), so a_j = H_n - H_j, c_j = n - j."""
    qkv = uneven(1, n)
    every_row = ZipVL(min_tokens=0).method_with(MassSelection(tau=tau, probe="all"))
    output, _, state = prefill(every_row, (torch.zeros_like(qkv[0]), *qkv[1:]))
    harmonic = [sum(1 / (i + 1) for i in range(j)) for j in range(n + 1)]
    a = [harmonic[n] - harmonic[j] for j in range(n)]
    p = next(m for m in range(1, n + 1) if sum(a[:m]) >= tau * n - 1e-9)  # a falls with j
    normalized = [a[j] / (n - j) for j in range(n)]
    best = sorted(range(n), key=lambda j: -normalized[j])[:p]
    assert kept_rows(state) == [sorted({*best, n - 1})]
    assert state.records[0].mass[0] == pytest.approx(sum(a[j] for j in {*best, n - 1}) / n, rel=1e-5)
    assert torch.isfinite(output).all()


def test_counting_is_by_raw_attention_and_choosing_by_normalized() -> None:
    sums = torch.tensor([[6.0, 3.0, 0.5, 0.5]])
    counts = torch.tensor([[12.0, 12.0, 1.0, 1.0]])
    assert choose(sums, counts, tau=0.85) == [[0, 2, 3]]  # p = 2: 3 is forced, 0.5, 0.25 < 0.5 = 0.5; earlier first
    assert choose(sums, counts, tau=0.85, select_by="raw") == [[0, 1, 3]]
    assert choose(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), tau=0.5) == [[0, 1, 3]]  # ties keep the earlier token


@pytest.mark.parametrize("n", [1, 2, 100])
def test_fewer_tokens_than_probes_use_every_row(n: int) -> None:
    selection = MassSelection()
    assert selection.probe_rows(n, layer=0, segment=0).tolist() == list(range(n))
    assert torch.isfinite(prefill(ZipVL(min_tokens=0), uneven(1, n))[0]).all()


def test_probes_are_a_function_of_seed_layer_and_length() -> None:
    def rows(layer: int = 0, length: int = 1000, seed: int = 0) -> list[int]:
        torch.manual_seed(len(drawn))
        return MassSelection(seed=seed).probe_rows(length, layer=layer, segment=0).tolist()

    drawn: list[list[int]] = []
    for arguments in ({}, {}, {"layer": 1}, {"seed": 1}):
        drawn.append(rows(**arguments))
    assert drawn[0] == drawn[1]
    assert len({tuple(each) for each in drawn}) == 3
    assert drawn[0][64:] == list(range(936, 1000))
    assert len(set(drawn[0])) == 128
