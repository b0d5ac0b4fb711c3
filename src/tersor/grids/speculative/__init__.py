"""Speculative Jacobi decoding: the image that raster decoding draws from the same seed, in fewer passes."""

from tersor._lazy import members

_MEMBERS = {
    "SpeculativeConfig": "tersor.grids.speculative.config",
    "SpeculativeOutput": "tersor.grids.speculative.generation",
    "apply_speculative": "tersor.grids.speculative.generation",
    "remove_speculative": "tersor.grids.speculative.generation",
    "speculative": "tersor.grids.speculative.generation",
    "speculative_generate": "tersor.grids.speculative.generation",
}
__getattr__, __dir__ = members(__name__, _MEMBERS)
