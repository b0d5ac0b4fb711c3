"""Pair recall: the task on which saliency metrics differ most, for a model of its own (`tiny-recall`).

A context of shuffled *pair tokens*, each of which stands for one key with its value, and filler tokens; then the keys
are asked one after the other. Every fact is one token, so whether a metric kept it shows in the answer at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tersor._compat import with_cache
from tersor.kv.bench.contenders import Contender, bytes_at_half_precision, half_precision_dense
from tersor.kv.bench.recall import Scores
from tersor.kv.tape import RECORDER, record, replay

KEYS = VALUES = 24
PAIRS, FILLERS, FILLER_KINDS = 16, 64, 32
#: Token layout: pairs, then keys, values, fillers and the separator.
FIRST_KEY = KEYS * VALUES
FIRST_VALUE = FIRST_KEY + KEYS
FIRST_FILLER = FIRST_VALUE + VALUES
SEPARATOR = FIRST_FILLER + FILLER_KINDS
VOCABULARY = SEPARATOR + 1
CONTEXT = PAIRS + FILLERS


def pair_samples(n: int, *, seed: int) -> Tensor:
    """``n`` samples ``[n, CONTEXT + 1 + 2 * PAIRS]`` int64: context, separator, then key, value, key, value, ...

    Keys are distinct within a sample and asked in random order; rows depend on (seed, row) only.
    """
    rows = np.empty((n, CONTEXT + 1 + 2 * PAIRS), dtype=np.int64)
    for row in range(n):
        rng = np.random.default_rng([seed, row])
        keys, values = rng.permutation(KEYS)[:PAIRS], rng.integers(VALUES, size=PAIRS)
        context = np.concatenate([keys * VALUES + values, FIRST_FILLER + rng.integers(FILLER_KINDS, size=FILLERS)])
        order = rng.permutation(PAIRS)
        questions = np.stack([FIRST_KEY + keys[order], FIRST_VALUE + values[order]], axis=1).ravel()
        rows[row] = np.concatenate([rng.permutation(context), [SEPARATOR], questions])
    return torch.from_numpy(rows)


@torch.inference_mode()
def score_pairs(
    model: PreTrainedModel, rivals: Sequence[Contender], *, n: int, seed: int, batch: int = 64
) -> dict[str, Scores]:
    """Accuracy of every contender over ``n`` samples; one score a sample, the share of its 16 keys answered right.

    The context alone is compressed; all questions are read from the compressed cache.
    """
    scores = {rival.name: Scores() for rival in rivals}
    samples = pair_samples(n, seed=seed)
    with RECORDER.on(model):
        for start in range(0, n, batch):
            rows = samples[start : start + batch]
            tape = record(model, rows[:, :CONTEXT])
            questions = rows[:, CONTEXT:]
            for rival in rivals:
                cache = replay(tape, rival.build(model.config))
                held = bytes_at_half_precision(cache)
                logits = model(questions[:, :-1], **with_cache(cache)).logits
                right = logits[:, 1::2].argmax(-1) == questions[:, 2::2]
                dense = half_precision_dense(model.config, len(rows), CONTEXT)
                scores[rival.name].add(right.float().mean(-1).tolist(), held, dense)
    return scores
