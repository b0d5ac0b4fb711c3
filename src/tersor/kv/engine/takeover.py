"""Give a model's text decoder tersor's attention function, and give it back as it was."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from tersor._compat import choose_attention
from tersor._errors import UnsupportedError, WrongTypeError
from tersor.kv.engine.cache import NothingToCompressError
from tersor.kv.engine.call import ATTENTION_NAME, EAGER_ATTENTION_NAME


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The model of transformers whose ``generate`` runs: ``model`` itself, or what a wrapper (PEFT, compiled) holds.

    Raises:
        TypeError: If there is none, or more than one side by side.
    """
    held = model.modules() if isinstance(model, nn.Module) else iter(())
    found = [each for each in held if isinstance(each, PreTrainedModel) and isinstance(each, GenerationMixin)]
    if found:
        inside = set(found[0].modules())
        if others := [type(each).__name__ for each in found if each not in inside]:
            raise WrongTypeError(
                f"{type(model).__name__} holds several models that generate ({type(found[0]).__name__}, "
                f"{', '.join(others)}); give the one to compress"
            )
        return found[0]
    raise WrongTypeError(
        f"{type(model).__name__} is no model of transformers that generates, and holds none; give the model that "
        "from_pretrained returned"
    )


def cache_name(model: PreTrainedModel) -> str:
    """The keyword under which a model's forward takes its cache.

    Raises:
        NotImplementedError: If it takes none.
    """
    names = inspect.signature(model.forward).parameters
    for name in ("cache", "past_key_values"):
        if name in names:
            return name
    raise NothingToCompressError(f"{type(model).__name__}.forward takes no cache of keys and values to compress")


class Takeover:
    """The attention function of one model, changed and restored.

    The implementation is set on the text decoder's own configuration and on no other: towers for pictures and sound
    keep theirs.

    Args:
        model: A model of transformers.

    Raises:
        NotImplementedError: If the model's attention cannot be chosen, or its cache is one of its own.
    """

    def __init__(self, model: PreTrainedModel):
        text = model.config.get_text_config(decoder=True)
        parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        #: The parts of the model that are configured by the text decoder's configuration, or by a copy of it.
        decoders = [part for part in parts if part.config is text or type(part.config) is type(text)] or [model]
        if not all(part._can_set_attn_implementation() for part in decoders):
            raise UnsupportedError(
                f"{type(model).__name__} does not let its attention function be chosen "
                "(it does not go through transformers' AttentionInterface), so its cache cannot be compressed"
            )
        if not model._supports_default_dynamic_cache():
            raise UnsupportedError(
                f"{type(model).__name__} keeps a cache class of its own, which tersor cannot stand in for; use the "
                "library's"
            )
        eager = not all(part._supports_sdpa for part in decoders)
        self.name = EAGER_ATTENTION_NAME if eager else ATTENTION_NAME
        self.configs: list[PreTrainedConfig] = list({id(each.config): each.config for each in decoders}.values())
        if text not in self.configs:
            self.configs.append(text)
        self.previous: list[str | None] = []

    def change(self) -> None:
        """Set tersor's function."""
        previous = [config._attn_implementation for config in self.configs]
        if {ATTENTION_NAME, EAGER_ATTENTION_NAME} & set(previous):
            raise RuntimeError(
                "the model's configuration is in a session already: another model that shares it is in one, or "
                "the model was copied inside one; leave that session, or call model.set_attn_implementation('sdpa')"
            )
        self.previous = previous
        for config in self.configs:
            choose_attention(config, self.name)

    def restore(self) -> None:
        """Set what was there before."""
        for config, name in zip(self.configs, self.previous, strict=False):
            choose_attention(config, name)
        self.previous = []
