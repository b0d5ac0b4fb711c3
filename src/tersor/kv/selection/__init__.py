"""Selection: which of the tokens waiting for compression matter."""

from tersor._lazy import members

_MEMBERS = {
    "MassSelection": "tersor.kv.selection.mass",
    "RandomSelection": "tersor.kv.selection.ratio",
    "RatioSelection": "tersor.kv.selection.ratio",
    "RecentSelection": "tersor.kv.selection.ratio",
    "SaliencySelection": "tersor.kv.selection.ratio",
    "Selection": "tersor.kv.selection.base",
    "Waiting": "tersor.kv.selection.base",
}
__getattr__, __dir__ = members(__name__, _MEMBERS)
