"""NAR (arXiv 2503.10696): models with a head for each axis of the grid, which decode a front of cells a pass."""

from tersor._lazy import members

_MEMBERS = {
    "MixingPlan": "tersor.grids.nar.heads",
    "NARConfig": "tersor.grids.nar.model",
    "NARForImageGeneration": "tersor.grids.nar.heads",
    "NARImageOutput": "tersor.grids.nar.heads",
    "flipped": "tersor.grids.nar.heads",
    "front_plans": "tersor.grids.nar.heads",
    "mixing_plan": "tersor.grids.nar.heads",
    "visibility": "tersor.grids.nar.heads",
}
__getattr__, __dir__ = members(__name__, _MEMBERS)
