"""Prefill: how a prompt attends, densely or among selected tokens."""

from tersor._lazy import members

_MEMBERS = {
    "SparsePrefill": "tersor.kv.prefill.sparse",
    "SparsityStats": "tersor.kv.prefill.sparsity",
}
__getattr__, __dir__ = members(__name__, _MEMBERS)
