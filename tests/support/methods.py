"""Every KV method that the matrix of methods runs (tests/kv/test_methods.py), and what each must keep or refuse.

A new method is tested by one more entry in `METHODS`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tersor import CachePlan, MiniCache, ZipCache, ZipVL, compose
from tersor.kv.depth.pairs import MergedPairs
from tersor.kv.method import KVMethod
from tersor.kv.recipe import Recipe
from tersor.kv.selection.mass import MassSelection
from tersor.kv.storage.mixed import MixedPrecisionStorage


@dataclass(frozen=True)
class Case:
    """One method.

    Args:
        recipe: As a user would run it, on prompts of 30 tokens and more.
        raw: The same choices, but stored so that nothing is lost: the tokens must be those of a `DynamicCache`.
        refuses: Properties that it cannot have, and what the error says.
        exempt: Properties that do not apply to it, and why.
        shrinks: Whether the cache takes less than 16 bits a number.
    """

    recipe: Recipe | KVMethod
    raw: Recipe | KVMethod
    refuses: dict[str, str] = field(default_factory=dict)
    exempt: dict[str, str] = field(default_factory=dict)
    shrinks: bool = True


SMALL = {"streaming_gap": 10, "min_tokens_to_compress": 8}
MERGE = {"start_layer": 0, "max_relative_error": 2.0}
EVERYTHING_APART = MiniCache(**MERGE, gamma=1.0, bits=16)
HEADS = {"saliency_scope": "kv_head", "value_param_scope": "token_head"}
SPARSE = {"tau": 0.8, "min_tokens": 0}
#: A sparse prefill chooses its tokens by the end of the prompt.
BY_THE_END = {
    "crop": "none can be taken back",
    "prompt lookup": "assisted decoding, prompt lookup and crop",
    "chunked prefill": "prefill_chunk_size does not go",
}


def merged_mass(tau: float, **bits: int) -> KVMethod:
    """What no paper did: tokens by attention mass, stored in two widths, in layers merged in pairs."""
    return KVMethod(
        name="mass on pairs",
        selection=MassSelection(tau=tau),
        storage=MixedPrecisionStorage(**bits),
        depth=MergedPairs(start_layer=0, max_relative_error=2.0, gamma=1.0 if bits else 0.05),
        **SMALL,
    )


METHODS = {
    "zipcache": Case(ZipCache(**SMALL), ZipCache(saliency_ratio=0.5, high_bits=16, low_bits=16, **SMALL)),
    "zipcache, one width": Case(
        ZipCache(saliency_ratio=1.0, **SMALL), ZipCache(saliency_ratio=1.0, high_bits=16, **SMALL)
    ),
    "zipcache, per head": Case(
        ZipCache(**HEADS, **SMALL), ZipCache(saliency_ratio=0.5, high_bits=16, low_bits=16, **HEADS, **SMALL)
    ),
    "zipcache, evict": Case(
        ZipCache(low_bits=0, **SMALL), ZipCache(saliency_ratio=1.0, high_bits=16, low_bits=0, **SMALL)
    ),
    "zipcache, recent": Case(
        ZipCache(recent_fp_tokens=4, **SMALL),
        ZipCache(saliency_ratio=0.5, high_bits=16, low_bits=16, recent_fp_tokens=4, **SMALL),
        exempt={"stored right padding": "the newest tokens are the last columns, whether padding or not"},
    ),
    "minicache": Case(MiniCache(**MERGE, **SMALL), MiniCache(**MERGE, **SMALL, gamma=1.0, bits=16)),
    "minicache, no pairs": Case(MiniCache(pairs=(), **SMALL), MiniCache(pairs=(), bits=16, **SMALL)),
    "minicache, by token": Case(
        MiniCache(granularity="token", **MERGE, **SMALL),
        MiniCache(granularity="token", gamma=1.0, bits=16, **MERGE, **SMALL),
    ),
    "zipvl, evict": Case(ZipVL(**SPARSE), ZipVL(tau=1.0, min_tokens=0), BY_THE_END),
    "zipvl, quantize": Case(
        ZipVL(policy="quantize", recompress_every=10, **SPARSE),
        ZipVL(policy="quantize", recompress_every=10, tau=1.0, min_tokens=0, high_bits=16, low_bits=16),
        BY_THE_END,
    ),
    "zipvl, keep": Case(
        ZipVL(policy="keep", **SPARSE), ZipVL(policy="keep", tau=1.0, min_tokens=0), BY_THE_END, shrinks=False
    ),
    "zipcache + minicache": Case(
        compose(ZipCache(**SMALL), MiniCache(**MERGE)),
        compose(ZipCache(saliency_ratio=0.5, high_bits=16, low_bits=16, **SMALL), MiniCache(start_layer=0, gamma=1.0)),
    ),
    "zipvl + minicache": Case(
        compose(ZipVL(policy="quantize", recompress_every=10, **SPARSE), MiniCache(**MERGE)),
        compose(ZipVL(policy="keep", tau=1.0, min_tokens=0), EVERYTHING_APART),
        BY_THE_END,
    ),
    "zipvl + zipcache": Case(
        compose(ZipVL(policy="keep", **SPARSE), ZipCache(**SMALL)),
        compose(
            ZipVL(policy="keep", tau=1.0, min_tokens=0),
            ZipCache(saliency_ratio=0.5, high_bits=16, low_bits=16, **SMALL),
        ),
        BY_THE_END,
    ),
    "plan": Case(
        CachePlan(recipes=(ZipCache(**SMALL), ZipCache(saliency_ratio=1.0, high_bits=3, **SMALL)), layers=(1, 0)),
        CachePlan(
            recipes=(
                ZipCache(saliency_ratio=0.5, high_bits=16, low_bits=16, **SMALL),
                ZipCache(saliency_ratio=1.0, high_bits=16, **SMALL),
            ),
            layers=(1, 0),
        ),
    ),
    "choices of one's own": Case(merged_mass(0.8), merged_mass(0.8, high_bits=16, low_bits=16)),
}
