"""How much of an expert a delta keeps, by hand-made models that answer what they are told to."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tersor.experts.bench import quality
from tersor.experts.bench.quality import Kept, calibration_rows, exact, low_rank, score
from tersor.experts.bench.skills import EOS, PAD, VOCABULARY, Example, encode, rows_of

EXAMPLES = [Example("ab>", "ba"), Example("xyz>", "zyx")]


class Oracle:
    """Writes the answers of some examples and something else for the others; ``sure`` is a wrong letter's share."""

    def __init__(self, right: list[Example], share: float = 0.9) -> None:
        self.answers = {example.prompt: [*encode(example.answer), EOS] for example in right}
        self.share = share

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        logits = torch.full((*input_ids.shape, VOCABULARY), math.log((1 - self.share) / (VOCABULARY - 1)))
        for row, ids in enumerate(input_ids.tolist()):
            for prompt, answer in self.answers.items():
                start = encode(prompt)
                if ids[: len(start)] == start:
                    for place, token in enumerate(answer):
                        if len(start) - 1 + place < len(ids):
                            logits[row, len(start) - 1 + place, token] = math.log(self.share)
        return SimpleNamespace(logits=logits)


def test_an_answer_is_exact_if_every_token_is_the_likeliest() -> None:
    assert exact(Oracle(EXAMPLES), EXAMPLES) == [True, True]
    assert exact(Oracle(EXAMPLES[:1]), EXAMPLES) == [True, False]


def test_the_end_belongs_to_the_answer() -> None:
    endless = Oracle(EXAMPLES)
    endless.answers["ab>"] = encode("ba") + encode("b")
    assert exact(endless, EXAMPLES) == [False, True]


def test_divergence_is_a_mean_over_the_answer_s_tokens() -> None:
    same = score(Oracle(EXAMPLES), Oracle(EXAMPLES), EXAMPLES, nbytes=7)
    assert same.divergence == pytest.approx([0.0, 0.0], abs=1e-6) and same.nbytes == 7
    other = score(Oracle(EXAMPLES, 0.5), Oracle(EXAMPLES, 0.9), EXAMPLES, nbytes=7)
    rest = 0.1 * math.log((0.1 / (VOCABULARY - 1)) / (0.5 / (VOCABULARY - 1)))
    assert other.divergence == pytest.approx([0.9 * math.log(0.9 / 0.5) + rest] * 2, rel=1e-4)
    assert other.right == other.expert_right == [True, True]


def test_intervals_of_what_is_kept() -> None:
    kept = Kept([True] * 3 + [False], [True] * 4, [0.1, 0.2, 0.3, 0.4], 10)
    assert kept.accuracy().value == 0.75 and kept.accuracy().interval == "95% Wilson"
    assert kept.kl().value == pytest.approx(0.25) and kept.kl().low < 0.25 < kept.kl().high


def test_calibration_reads_whole_answers_without_padding() -> None:
    rows = calibration_rows("sort", 5)
    assert len(rows) == 5 and all(PAD not in row and row[-1] == EOS for row in rows)
    ids, _ = rows_of([Example("ab>", "ab"), Example("abcd>", "abcd")])
    assert ids.shape == (2, 10) and int((ids == PAD).sum()) == 4


def test_a_low_rank_delta_takes_no_more_bytes_than_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a delta of rank one nothing is lost, whatever its size; of a full one all but the largest direction."""
    base, expert = torch.nn.Linear(8, 6, bias=False), torch.nn.Linear(8, 6, bias=False)
    left, right = torch.randn(6, 1), torch.randn(1, 8)
    with torch.no_grad():
        expert.weight.copy_(base.weight + left @ right)
    models = [torch.nn.ModuleDict({"only": each}) for each in (base, expert)]
    packed = SimpleNamespace(tensors=[torch.zeros(14 * 2, dtype=torch.uint8)])
    delta: Any = SimpleNamespace(manifest=SimpleNamespace(modules={"only": None}), packed=lambda name: packed)
    made = low_rank(*models, delta)
    torch.testing.assert_close(made.get_submodule("only").weight, expert.weight, rtol=0, atol=5e-3)
    assert quality.SVD.endswith("at equal bytes")
