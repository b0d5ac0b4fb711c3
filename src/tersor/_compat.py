"""Every version check of the libraries that tersor leans on, each with the release that ends it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache as once
from importlib.metadata import version
from typing import Any

#: transformers releases whose cache contract (negative `crop`, `activate_past_recording`, no
#: `cache_position` keyword) this version of tersor is written for and tested with.
TRANSFORMERS_MINIMUM = (5, 20)
TRANSFORMERS_BELOW = (5, 25)
#: transformers releases whose continuous batching `tersor.experts.continuous` wraps, private parts included.
CONTINUOUS_MINIMUM = (5, 20)
CONTINUOUS_BELOW = (5, 25)
#: The first release of peft that calls the model which it wraps, and not that model's ``forward``.
PEFT_MINIMUM = (0, 21)


def check_transformers() -> None:
    """Raise `ImportError` with the command to run when transformers is outside the tested range."""
    found = version("transformers")
    release = tuple(int(part) for part in found.split(".")[:2])
    if not TRANSFORMERS_MINIMUM <= release < TRANSFORMERS_BELOW:
        low, below = (".".join(map(str, bound)) for bound in (TRANSFORMERS_MINIMUM, TRANSFORMERS_BELOW))
        raise ImportError(
            f"tersor needs transformers >={low},<{below}, found {found}: pip install 'transformers>={low},<{below}'"
        )


def untested_for_continuous_batching() -> str | None:
    """The installed release of transformers where experts under continuous batching were not tested with it."""
    found = version("transformers")
    release = tuple(int(part) for part in found.split(".")[:2])
    return None if CONTINUOUS_MINIMUM <= release < CONTINUOUS_BELOW else found


def check_peft(model: Any) -> None:
    """Raise `ImportError` with the command to run for a PEFT model of before 0.21, which calls past its own hooks."""
    if hasattr(model, "peft_config") and hasattr(model, "base_model"):
        found = version("peft")
        if tuple(int(part) for part in found.split(".")[:2]) < PEFT_MINIMUM:
            raise ImportError(f"sessions on PEFT models need peft >=0.21, found {found}: pip install 'peft>=0.21'")


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


def checkpoint_activations(model: Any, **options: Any) -> None:
    """Have a model compute its activations again in the backward pass; before 5.23 the method had another name.

    Args:
        model: A `PreTrainedModel`.
        options: Of `torch.utils.checkpoint.checkpoint`.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options or None)


@contextmanager
def older_checkpointing_names() -> Iterator[None]:
    """Inside, 5.24 does not warn that trl 1.16 and peft 0.21 call checkpointing by its older name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        yield


def name_checkpointing(arguments: Any) -> None:
    """Give a trainer's arguments their newer names for checkpointing; those of 5.24 warn of the older ones.

    Args:
        arguments: `TrainingArguments` before their ``__post_init__``; those before 5.23 have no newer names.
    """
    for kind in ("", "_kwargs"):
        newer = f"activation_checkpointing{kind}"
        if hasattr(arguments, newer) and getattr(arguments, newer) is None:
            setattr(arguments, newer, getattr(arguments, f"gradient_checkpointing{kind}"))


def choose_attention(config: Any, name: str | None) -> None:
    """Set the attention implementation of one configuration, and of none below it, whatever there is below it.

    Args:
        config: A configuration of transformers; changed.
        name: Of transformers' `AttentionInterface`.
    """
    config._attn_implementation = {**_attention_of(config), "": name}


def _attention_of(config: Any) -> dict[str, Any]:
    """The implementations of a configuration and of those below it, in the form that its setter takes."""
    parts = {key: part for key in config.sub_configs if (part := getattr(config, key, None)) is not None}
    return {"": config._attn_implementation, **{key: _attention_of(part) for key, part in parts.items()}}
