"""How much of an expert a delta keeps: exact answers, divergence from the expert, and planted channels found."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor import zoo
from tersor.bench.measure import Estimate, bootstrap_interval, wilson_interval
from tersor.experts.bench.skills import PAD, Example, examples, rows_of
from tersor.experts.compress import compress_expert
from tersor.experts.config import DeltaConfig
from tersor.experts.delta import ExpertDelta
from tersor.experts.host import merge_expert

MODEL = "tiny-experts"
#: Prompts that saliency and distillation see; none is held out.
CALIBRATION, CALIBRATION_SEED = 512, 5
LSQ, MINMAX, MSE = "2 bit LSQ", "2 bit min-max", "2 bit MSE"
SVD = "SVD of the delta at equal bytes"
BASE = "no delta (base)"
#: Selections and numbers of salient channels that planted ones are looked for among.
PLANTED_BY = (("reconstruction", 2), ("reconstruction", 4), ("activation", 2), ("magnitude", 2), ("random", 2))

_Settings = dict[str, Any]
_NAIVE: _Settings = {"bits": 2, "num_salient": 0, "step_init": "minmax"}
_LSQ: _Settings = {"bits": 2, "num_salient": 0, "step_init": "lsq"}
_MSE: _Settings = {"bits": 2, "num_salient": 0}
_ONE: _Settings = {"bits": 1, "num_salient": 0}
_KEPT: _Settings = {"num_salient": 2}

#: The table: settings of `DeltaConfig` by row.
ROWS: dict[str, _Settings] = {
    "1 bit, k=0": _ONE,
    "1 bit, k=2": _ONE | _KEPT,
    "1 bit, k=0, distilled": _ONE | {"distill": "codes"},
    "1 bit, k=2, distilled": _ONE | _KEPT | {"distill": "codes"},
    "1 bit, k=2, closed form": _ONE | _KEPT | {"distill": "closed_form"},
    f"{MINMAX}, k=0 (naive)": _NAIVE,
    f"{MINMAX}, k=2": _NAIVE | _KEPT,
    f"{LSQ}, k=0": _LSQ,
    f"{LSQ}, k=2": _LSQ | _KEPT,
    f"{LSQ}, k=0, distilled": _LSQ | {"distill": "codes"},
    f"{MSE}, k=0": _MSE,
    f"{MSE}, k=2": _MSE | _KEPT,
    f"{MSE}, k=8": _MSE | {"num_salient": 8},
    f"{MSE}, k=2 by magnitude": _MSE | _KEPT | {"selection": "magnitude"},
    f"{MSE}, k=2 at random": _MSE | _KEPT | {"selection": "random"},
    "2 bit midrise MSE, k=0": _MSE | {"grid": "midrise"},
    f"{MSE}, k=0, distilled": _MSE | {"distill": "codes"},
    f"{MSE}, k=2, distilled": _MSE | _KEPT | {"distill": "codes"},
    "4 bit, k=0": _MSE | {"bits": 4},
    "4 bit, k=2": _MSE | _KEPT | {"bits": 4},
}


@dataclass(frozen=True)
class Kept:
    """What a model answers to the same prompts as the expert."""

    right: list[bool]
    """Whether each answer is exact, greedily written."""
    expert_right: list[bool]
    """Whether the expert's is."""
    divergence: list[float]
    """By prompt, the mean over the answer's tokens of KL(expert || model) in nats."""
    nbytes: int
    """Bytes of what is stored beside the base."""

    def accuracy(self) -> Estimate:
        """Share of exact answers with its Wilson interval."""
        return wilson_interval(sum(self.right), len(self.right))

    def kl(self) -> Estimate:
        """Mean divergence in nats a token, with its bootstrap interval over prompts."""
        return bootstrap_interval(self.divergence)


@dataclass(frozen=True)
class Family:
    """tiny-experts: a base, the experts that were fine-tuned from it, and the channels that were planted in it."""

    base: Any
    experts: dict[str, Any]
    planted: dict[str, list[int]]

    @classmethod
    def load(cls) -> Family:
        """From the installed files."""
        folder = zoo.path(MODEL)
        return cls(zoo.load_model(MODEL), zoo.load_experts(MODEL), read_planted(folder))


def read_planted(folder: Path) -> dict[str, list[int]]:
    """Planted input channels by linear."""
    planted: dict[str, list[int]] = json.loads((folder / "planted.json").read_text(encoding="utf-8"))
    return planted


def calibration_rows(skill: str, n: int = CALIBRATION) -> list[list[int]]:
    """Ids of prompts with their answers, of those that models are trained on."""
    ids, _ = rows_of(examples(skill, n, seed=CALIBRATION_SEED, held_out=False))
    return [[token for token in row if token != PAD] for row in ids.tolist()]


def compress(family: Family, skill: str, settings: _Settings) -> ExpertDelta:
    """One expert's delta, calibrated on its own skill."""
    return compress_expert(
        family.base, family.experts[skill], DeltaConfig(**settings), calibration=calibration_rows(skill),
        sequences=CALIBRATION, batch=32,
    )  # fmt: skip


@torch.inference_mode()
def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """Float32 ``[rows, tokens, vocabulary]`` of what follows each token but the last; rows are padded on the right."""
    logits: Tensor = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.log_softmax(logits.float(), dim=-1)


@torch.inference_mode()
def exact(model: Any, chosen: Sequence[Example]) -> list[bool]:
    """Whether each answer would be written exactly by greedy decoding.

    It is if each of its tokens is the likeliest one after the right ones before it, so one pass tells.
    """
    ids, asked = rows_of(chosen)
    guess = log_probabilities(model, ids).argmax(-1)
    right: list[bool] = ((guess == ids[:, 1:]) | ~asked[:, 1:]).all(1).tolist()
    return right


def score(student: Any, teacher: Any, chosen: Sequence[Example], *, nbytes: int) -> Kept:
    """`Kept` of ``student`` against the uncompressed expert ``teacher``."""
    ids, asked = rows_of(chosen)
    asked = asked[:, 1:]
    ours, wanted = log_probabilities(student, ids), log_probabilities(teacher, ids)
    divergence = (wanted.exp() * (wanted - ours)).sum(-1).masked_fill(~asked, 0.0).sum(1) / asked.sum(1)
    return Kept(exact(student, chosen), exact(teacher, chosen), divergence.tolist(), nbytes)


def quality_table(
    family: Family, skill: str, *, n: int, seed: int, rows: Sequence[str] = tuple(ROWS)
) -> Iterator[tuple[str, Kept]]:
    """The base, each of ``rows``, and the strongest simple alternative, on ``n`` held-out prompts of ``skill``."""
    chosen = examples(skill, n, seed=seed, held_out=True)
    teacher = family.experts[skill]
    judge = partial(score, teacher=teacher, chosen=chosen)
    yield BASE, judge(family.base, nbytes=0)
    for row in rows:
        delta = compress(family, skill, ROWS[row])
        yield row, judge(merge_expert(family.base, delta), nbytes=delta.nbytes)
    same = compress(family, skill, ROWS[f"{MSE}, k=2"])
    yield SVD, judge(low_rank(family.base, teacher, same), nbytes=same.nbytes)


@torch.no_grad()
def low_rank(base: Any, expert: Any, delta: ExpertDelta) -> Any:
    """The expert with each linear's delta as the product of two 16-bit factors, as an adapter has it, that take no more
    bytes than ``delta``'s; at least one rank. All else is the expert's own.
    """
    model = copy.deepcopy(expert)
    for name in delta.manifest.modules:
        old, weight = base.get_submodule(name).weight, model.get_submodule(name).weight
        held = sum(part.nbytes for part in delta.packed(name).tensors)
        rank = max(1, held // (2 * sum(weight.shape)))
        u, s, v = torch.linalg.svd(weight - old, full_matrices=False)
        left, right = (u[:, :rank] * s[:rank]).half().float(), v[:rank].half().float()
        weight.copy_(old + left @ right)
    return model


def planted_recalls(family: Family) -> dict[tuple[str, int], tuple[Estimate, int]]:
    """Share of the planted channels of all experts that are among the ``k`` salient ones of their linear.

    Returns:
        The share and how many channels it is of, by selection and ``k``.
    """
    found = {}
    for selection, k in PLANTED_BY:
        hits = total = 0
        for skill in family.experts:
            delta = compress(family, skill, _LSQ | {"num_salient": k, "selection": selection})
            for name, channels in family.planted.items():
                hits += len(set(delta.packed(name).salient_index.tolist()) & set(channels))
                total += len(channels)
        found[selection, k] = (wilson_interval(hits, total), total)
    return found
