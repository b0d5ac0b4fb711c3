"""ZipAR (arXiv 2412.04062): windows of a raster image model's rows, decoded side by side."""

from tersor._lazy import members

_MEMBERS = {
    "ZipARConfig": "tersor.grids.zipar.config",
    "ZipAROutput": "tersor.grids.zipar.generation",
    "apply_zipar": "tersor.grids.zipar.generation",
    "remove_zipar": "tersor.grids.zipar.generation",
    "zipar": "tersor.grids.zipar.generation",
    "zipar_generate": "tersor.grids.zipar.generation",
}
__getattr__, __dir__ = members(__name__, _MEMBERS)
