"""Cheaper generative models, with the cost in quality printed next to every saving."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tersor import zoo
    from tersor.experts.compress import compress_expert
    from tersor.experts.config import DeltaConfig
    from tersor.experts.delta import ExpertDelta
    from tersor.experts.host import ExpertHost
    from tersor.grids.nar.heads import NARConfig, NARForImageGeneration
    from tersor.grids.nar.pipeline import NARPipeline
    from tersor.grids.zipar.generation import ZipARConfig, apply_zipar, remove_zipar, zipar, zipar_generate
    from tersor.kv.compose import compose
    from tersor.kv.minicache import MiniCache
    from tersor.kv.zipcache import ZipCache
    from tersor.kv.zipvl import ZipVL

__version__ = "0.1.0"

__all__ = [
    "DeltaConfig",
    "ExpertDelta",
    "ExpertHost",
    "MiniCache",
    "NARConfig",
    "NARForImageGeneration",
    "NARPipeline",
    "ZipARConfig",
    "ZipCache",
    "ZipVL",
    "__version__",
    "apply_zipar",
    "compose",
    "compress_expert",
    "remove_zipar",
    "zipar",
    "zipar_generate",
    "zoo",
]

# Public name -> where it lives. Resolved on first use, so that `import tersor` loads no torch.
_MEMBERS = {
    "DeltaConfig": "tersor.experts.config",
    "ExpertDelta": "tersor.experts.delta",
    "ExpertHost": "tersor.experts.host",
    "MiniCache": "tersor.kv.minicache",
    "NARConfig": "tersor.grids.nar.heads",
    "NARForImageGeneration": "tersor.grids.nar.heads",
    "NARPipeline": "tersor.grids.nar.pipeline",
    "ZipARConfig": "tersor.grids.zipar.generation",
    "ZipCache": "tersor.kv.zipcache",
    "ZipVL": "tersor.kv.zipvl",
    "apply_zipar": "tersor.grids.zipar.generation",
    "compose": "tersor.kv.compose",
    "compress_expert": "tersor.experts.compress",
    "remove_zipar": "tersor.grids.zipar.generation",
    "zipar": "tersor.grids.zipar.generation",
    "zipar_generate": "tersor.grids.zipar.generation",
}
_MODULES = {"zoo": "tersor.zoo"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name not in _MEMBERS:
        raise AttributeError(f"module 'tersor' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module(_MEMBERS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
