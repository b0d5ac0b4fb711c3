"""Every version check of the libraries that tersor leans on, each with the release that ends it."""

from __future__ import annotations

from importlib.metadata import version

#: transformers releases whose cache contract (negative `crop`, `activate_past_recording`, no
#: `cache_position` keyword) this version of tersor is written for and tested with.
TRANSFORMERS_MINIMUM = (5, 20)
TRANSFORMERS_BELOW = (5, 30)

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
