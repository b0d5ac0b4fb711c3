"""Cheaper generative models, with the cost in quality printed next to every saving."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tersor._lazy import HANDED_ON, members

if TYPE_CHECKING:
    from tersor import zoo
    from tersor._errors import TersorError
    from tersor.experts.compress import compress_expert
    from tersor.experts.config import DeltaConfig
    from tersor.experts.delta import ExpertDelta
    from tersor.experts.host import ExpertHost
    from tersor.grids.nar.heads import NARConfig, NARForImageGeneration
    from tersor.grids.nar.pipeline import NARPipeline
    from tersor.grids.speculative.config import SpeculativeConfig
    from tersor.grids.speculative.generation import (
        apply_speculative,
        remove_speculative,
        speculative,
        speculative_generate,
    )
    from tersor.grids.zipar.config import ZipARConfig
    from tersor.grids.zipar.generation import apply_zipar, remove_zipar, zipar, zipar_generate
    from tersor.kv.compose import compose
    from tersor.kv.minicache import MiniCache
    from tersor.kv.plan import CachePlan
    from tersor.kv.saved import load_cache
    from tersor.kv.zipcache import ZipCache
    from tersor.kv.zipvl import ZipVL

__version__ = "0.1.0"

__all__ = [
    "CachePlan",
    "DeltaConfig",
    "ExpertDelta",
    "ExpertHost",
    "MiniCache",
    "NARConfig",
    "NARForImageGeneration",
    "NARPipeline",
    "SpeculativeConfig",
    "TersorError",
    "ZipARConfig",
    "ZipCache",
    "ZipVL",
    "__version__",
    "apply_speculative",
    "apply_zipar",
    "compose",
    "compress_expert",
    "load_cache",
    "remove_speculative",
    "remove_zipar",
    "speculative",
    "speculative_generate",
    "zipar",
    "zipar_generate",
    "zoo",
]

# Public name -> where it lives. Resolved on first use, so that `import tersor` loads no torch.
_MEMBERS = {
    "CachePlan": "tersor.kv.plan",
    "DeltaConfig": "tersor.experts.config",
    "ExpertDelta": "tersor.experts.delta",
    "ExpertHost": "tersor.experts.host",
    "MiniCache": "tersor.kv.minicache",
    "NARConfig": "tersor.grids.nar.model",
    "NARForImageGeneration": "tersor.grids.nar.heads",
    "NARPipeline": "tersor.grids.nar.pipeline",
    "SpeculativeConfig": "tersor.grids.speculative.config",
    "TersorError": "tersor._errors",
    "ZipARConfig": "tersor.grids.zipar.config",
    "ZipCache": "tersor.kv.zipcache",
    "ZipVL": "tersor.kv.zipvl",
    "apply_speculative": "tersor.grids.speculative.generation",
    "apply_zipar": "tersor.grids.zipar.generation",
    "compose": "tersor.kv.compose",
    "compress_expert": "tersor.experts.compress",
    "load_cache": "tersor.kv.saved",
    "remove_speculative": "tersor.grids.speculative.generation",
    "remove_zipar": "tersor.grids.zipar.generation",
    "speculative": "tersor.grids.speculative.generation",
    "speculative_generate": "tersor.grids.speculative.generation",
    "zipar": "tersor.grids.zipar.generation",
    "zipar_generate": "tersor.grids.zipar.generation",
}
# What the zoo offers although a system above it defines it: loaders, and the classes of its checkpoints.
HANDED_ON["tersor.zoo"] = {
    "LlamaGen": "tersor.grids.llamagen",
    "NARForImageGeneration": "tersor.grids.nar.heads",
    "PARForImageGeneration": "tersor.grids.nar.baselines",
    "RasterVideo": "tersor.grids.nar.baselines",
    "judge_of": "tersor.grids.pretrained",
    "load_image_tokenizer": "tersor.grids.pretrained",
    "load_judge": "tersor.grids.pretrained",
    "load_network": "tersor.ptq.networks",
    "load_text_encoder": "tersor.grids.nar.pretrained",
    "load_video_tokenizer": "tersor.grids.nar.pretrained",
}

_find, _names = members(__name__, _MEMBERS)


def __getattr__(name: str) -> Any:
    return importlib.import_module("tersor.zoo") if name == "zoo" else _find(name)


def __dir__() -> list[str]:
    return sorted({*_names(), *__all__})
