"""Every version check of the libraries that tersor leans on, each with the release that ends it."""

from __future__ import annotations

import inspect
from functools import cache as once
from importlib.metadata import version
from typing import Any

#: transformers releases whose cache contract (negative `crop`, `activate_past_recording`, no
#: `cache_position` keyword) this version of tersor is written for and tested with.
TRANSFORMERS_MINIMUM = (5, 20)
TRANSFORMERS_BELOW = (5, 25)

#: The release whose continuous batching `tersor.experts.continuous` was tested with; it looks at private parts of it.
CONTINUOUS_BATCHING = (5, 23)


def check_continuous_batching() -> None:
    """Raise `ImportError` for a release of transformers that experts under continuous batching were not tested with."""
    found = version("transformers")
    if tuple(int(part) for part in found.split(".")[:2]) != CONTINUOUS_BATCHING:
        wanted = ".".join(map(str, CONTINUOUS_BATCHING))
        raise ImportError(
            f"experts under continuous batching need transformers {wanted}, found {found}: pip install "
            f"'transformers~={wanted}.0', or use ExpertHost.generate, which batches requests that come together"
        )


def check_transformers() -> None:
    """Raise `ImportError` with the command to run when transformers is outside the tested range."""
    found = version("transformers")
    release = tuple(int(part) for part in found.split(".")[:2])
    if not TRANSFORMERS_MINIMUM <= release < TRANSFORMERS_BELOW:
        low, below = (".".join(map(str, bound)) for bound in (TRANSFORMERS_MINIMUM, TRANSFORMERS_BELOW))
        raise ImportError(
            f"tersor needs transformers >={low},<{below}, found {found}: pip install 'transformers>={low},<{below}'"
        )


@once
def cache_keyword() -> str:
    """The keyword under which `generate` and its models take a cache: ``cache``, ``past_key_values`` before 5.24."""
    from transformers import GenerationMixin

    names = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in names else "past_key_values"


def with_cache(cache: Any) -> dict[str, Any]:
    """``cache`` as a keyword of a model or of `generate`, under the installed release's name."""
    return {cache_keyword(): cache}


def take_cache(keywords: dict[str, Any]) -> Any:
    """Remove a cache from the keywords of a call, whichever name it came under; None if there is none."""
    found = [keywords.pop(name, None) for name in ("cache", "past_key_values")]
    return next((each for each in found if each is not None), None)
