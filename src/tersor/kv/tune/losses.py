"""What cache settings lose on pieces of text: how far the model's next words move, and how many bytes it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from tersor._compat import with_cache
from tersor._errors import TersorError
from tersor.bench.measure import Estimate, bootstrap_difference, bootstrap_interval
from tersor.kv.recipe import Recipe
from tersor.kv.tape import RECORDER, record, replay

#: The last of so many parts of a piece is read from the cache of the parts before it.
PARTS = 8
#: Pieces that are read together, as long as what is recorded of them takes no more than so many bytes.
BATCH, BATCH_BYTES = 16, 2**30


@dataclass
class Losses:
    """One number a piece, and bytes of all prompts together.

    Args:
        added: Loss of the text's own words against that of the uncompressed cache, nats a token.
        divergence: Mean over the tokens of ``KL(uncompressed || compressed)``, nats: the added loss that is expected
            of words that the model itself would write. It is never below 0 and spreads far less from text to text.
        held: Bytes of the compressed layers.
        dense: Bytes of a 16-bit cache of those layers.
    """

    added: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    held: int = 0
    dense: int = 0

    @property
    def ratio(self) -> float:
        """How many times smaller than 16 bits the compressed layers are."""
        return self.dense / self.held

    @property
    def mean(self) -> float:
        """Mean divergence, by which settings are chosen."""
        return sum(self.divergence) / len(self.divergence)

    def added_loss(self) -> Estimate:
        """Mean added loss with its bootstrap interval."""
        return bootstrap_interval(self.added)

    def against(self, other: Losses) -> Estimate:
        """Mean of this added loss less the other's on the same pieces, with its paired bootstrap interval."""
        return bootstrap_difference(self.added, other.added)


def split_at(tokens: int) -> int:
    """Tokens of a piece that are its prompt."""
    return tokens - tokens // PARTS


def measure(
    model: PreTrainedModel, pieces: Tensor, recipes: Mapping[str, Recipe], tell: Callable[[str], None]
) -> dict[str, Losses]:
    """The losses of each recipe on ``pieces`` ``[pieces, tokens]``, by its name.

    The prompt of a piece is compressed; the model then reads the rest at once from what is left of it. The uncompressed
    model reads the prompt once for all recipes, so they must leave a prompt's attention dense.

    Args:
        model: In eval mode.
        pieces: Ids without padding.
        recipes: By name.
        tell: Told the name of what is being measured.

    Raises:
        ValueError: If predictions are not finite.
    """
    losses = {name: Losses() for name in recipes}
    prompt = split_at(pieces.shape[1])
    with RECORDER.on(model), torch.inference_mode():
        for ids in pieces.split(_batch(model, prompt)):
            ids = ids.to(model.device)
            # The last token of the prompt is read again with the rest, whose first token it predicts.
            tape, rest = record(model, ids[:, : prompt - 1]), ids[:, prompt - 1 :]
            exact = _log_probabilities(model, replay(tape, DynamicCache(config=model.config)), rest)
            for name, recipe in recipes.items():
                tell(name)
                cache = recipe.cache(model.config)
                replay(tape, cache)
                own = losses[name]
                own.held += cache.memory_footprint()
                own.dense += cache.dense_footprint()
                found = _log_probabilities(model, cache, rest)
                own.divergence += (exact.exp() * (exact - found)).sum(-1).mean(-1).tolist()
                if not all(map(math.isfinite, own.divergence)):
                    raise TersorError(f"{name}: the model's predictions are not finite on these texts")
                own.added += (exact - found).gather(2, rest[:, 1:, None])[..., 0].mean(-1).tolist()
    return losses


def ratio_on(model: PreTrainedModel, pieces: Tensor) -> Callable[[Recipe], float]:
    """A function that says how many times smaller a recipe makes the prompts of ``pieces`` ``[pieces, tokens]``.

    It computes no attention.
    """
    with RECORDER.on(model):
        tape = record(model, pieces[:, : split_at(pieces.shape[1]) - 1].to(model.device))

    def ratio(recipe: Recipe) -> float:
        cache = recipe.cache(model.config)
        with RECORDER.on(model):
            replay(tape, cache)
        return cache.compression_ratio()

    return ratio


def _log_probabilities(model: PreTrainedModel, cache: Cache, ids: Tensor) -> Tensor:
    """Of what follows each of ``ids`` ``[batch, tokens]`` but the last, float32 ``[batch, tokens - 1, words]``."""
    logits: Tensor = model(ids[:, :-1], **with_cache(cache)).logits
    return logits.float().log_softmax(-1)


def _batch(model: PreTrainedModel, prompt: int) -> int:
    """Pieces that are read together: queries, keys and values of every layer are kept, and three sets of words."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    # Keys and values have no more heads than queries.
    kept = config.num_hidden_layers * prompt * 3 * heads * head_dim * model.dtype.itemsize
    words = 3 * 4 * config.vocab_size * prompt // (PARTS - 1)
    return int(min(BATCH, max(1, BATCH_BYTES // (kept + words))))
