"""What users would pick instead: one file a peer, each a cache or a method that runs in the same benchmark as ours.

Peers that evict or round run on tersor's own engine, so that they read the same attention and are timed with the same
kernels; caches that the library or an engine ships are those themselves, or store what those store.
"""

from __future__ import annotations

from tersor._lazy import installed

#: Peers that cannot run on this version of transformers, and why.
_UNPORTED = {
    "KIVI": "its code replaces the Llama and Mistral files of transformers 4.x and brings CUDA kernels; "
    "QuantizedCache is the library's own version of the idea",
    "kvpress": "releases up to 0.5.5 need transformers < 5.3: their hooks read a keyword that is no longer passed",
}


def unavailable() -> dict[str, str]:
    """Peer -> why it is not measured here."""
    missing = {} if installed("hqq") else {"QuantizedCache hqq": "hqq is not installed: pip install hqq"}
    return _UNPORTED | missing
