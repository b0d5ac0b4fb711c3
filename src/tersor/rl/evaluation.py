"""Accuracy and token ratio of a model over thresholds: the frontier that a training is to move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from tersor.bench.measure import Estimate, bootstrap_interval
from tersor.kv.zipvl import ZipVL
from tersor.rl.data import prompt_inputs, with_pictures
from tersor.rl.rollout import multi_budget_generate
from tersor.rl.verifiers import Verifier

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


@dataclass
class Frontier:
    """Questions at one threshold.

    Args:
        tau: The threshold; 1 is dense attention.
        scores: The verifier's score of each answer; questions that it cannot judge are left out.
        ratios: Token ratio of each question, mean over layers.
        layers: Sum of the token ratios over questions, by layer.
    """

    tau: float
    scores: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    layers: list[float] = field(default_factory=list)

    @property
    def accuracy(self) -> Estimate:
        """Mean score with its 95 % interval."""
        return bootstrap_interval(self.scores)

    @property
    def ratio(self) -> Estimate:
        """Mean token ratio over all layers with its 95 % interval."""
        return bootstrap_interval(self.ratios)

    def by_layer(self) -> list[float]:
        """Mean token ratio of each layer."""
        return [total / len(self.ratios) for total in self.layers]

    def sparse_ratio(self, dense: Sequence[int]) -> float:
        """Mean token ratio over the layers that are not ``dense``."""
        sparse = [ratio for layer, ratio in enumerate(self.by_layer()) if layer not in dense]
        return sum(sparse) / len(sparse)

    def summary(self, dense: Sequence[int]) -> dict[str, Any]:
        """The figures as JSON takes them."""
        right, ratio = self.accuracy, self.ratio
        return {
            "tau": self.tau, "n": len(self.scores),
            "accuracy": right.value, "accuracy_interval": [right.low, right.high],
            "token_ratio": ratio.value, "token_ratio_interval": [ratio.low, ratio.high],
            "token_ratio_sparse_layers": self.sparse_ratio(dense), "token_ratio_by_layer": self.by_layer(),
        }  # fmt: skip


def frontier(
    model: PreTrainedModel,
    processor: Any,
    data: Dataset,
    verifier: Verifier,
    recipe: ZipVL,
    taus: Sequence[float],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    on_batch: Callable[[float, int], None] = lambda tau, more: None,
) -> list[Frontier]:
    """Answer every question greedily at every threshold, and count.

    Args:
        model: The model that is asked.
        processor: Its processor.
        data: Columns as of `load_questions`.
        verifier: Scores an answer.
        recipe: Everything but the threshold.
        taus: Thresholds; 1 is dense.
        batch_size: Questions at once.
        max_new_tokens: Tokens of an answer at most.
        on_batch: Told of the threshold and how many more questions are done.
    """
    tokenizer = processor.tokenizer
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
    )  # fmt: skip
    found = [Frontier(tau) for tau in taus]
    training = model.training
    model.eval()
    try:
        with recipe.on(model) as session:
            for start in range(0, len(data), batch_size):
                rows = [data[index] for index in range(start, min(start + batch_size, len(data)))]
                inputs = prompt_inputs(processor, [with_pictures(row) for row in rows]).to(model.device)
                for each in found:
                    said = multi_budget_generate(
                        session, inputs, torch.full((len(rows),), each.tau, dtype=torch.float64), config
                    )
                    _count(each, processor, rows, said.completions, verifier)
                    each.ratios += said.token_ratio.tolist()
                    layers = [len(rows) * share for share in session.stats.per_layer]
                    each.layers = list(map(sum, zip(each.layers, layers, strict=True))) if each.layers else layers
                    on_batch(each.tau, len(rows))
    finally:
        model.train(training)
    return found


def _count(
    into: Frontier, processor: Any, rows: Sequence[Mapping[str, Any]], answers: list[list[int]], verifier: Verifier
) -> None:
    texts = processor.batch_decode(answers, skip_special_tokens=True)
    scores = [verifier(text, row["answer"]) for text, row in zip(texts, rows, strict=True)]
    into.scores += [score for score in scores if score is not None]
