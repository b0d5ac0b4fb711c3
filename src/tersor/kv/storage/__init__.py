"""Storage: in which form tokens are kept once they are compressed."""

from tersor._lazy import members

_MEMBERS = {
    "MixedPrecisionStorage": "tersor.kv.storage.mixed",
    "Storage": "tersor.kv.storage.mixed",
}
__getattr__, __dir__ = members(__name__, _MEMBERS)
