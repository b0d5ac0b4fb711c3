"""Depth: whether cache layers keep their own tokens or share directions."""

from tersor._lazy import members

_MEMBERS = {
    "Depth": "tersor.kv.depth.base",
    "MergeRule": "tersor.kv.depth.merging",
    "MergedPairs": "tersor.kv.depth.pairs",
    "PlannedLayers": "tersor.kv.depth.base",
    "SeparateLayers": "tersor.kv.depth.base",
}
__getattr__, __dir__ = members(__name__, _MEMBERS)
