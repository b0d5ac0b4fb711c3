"""Which fields of two configurations must agree, so that one model's weights can be the other's plus a delta.

A configuration class names the fields of its model type; those decide, unless they are in `FREE_FIELDS`. What training
tools and tokenizers add to ``config.json`` is declared by no class, and decides nothing.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from tersor.experts.config import ConfigMismatchError

#: Declared fields that may differ all the same: sizes are checked tensor by tensor, an expert's special tokens are its
#: own, and the rest is about training or about what a forward pass returns.
FREE_FIELDS = re.compile(
    r"vocab_size|tie_word_embeddings|max_position_embeddings|n_positions|n_ctx|use_cache|pretraining_tp"
    r"|max_window_layers|use_bfloat16|gradient_checkpointing|router_jitter_noise|return_dict|problem_type|id2label"
    r"|label2id|torch_dtype|dtype|architectures|chunk_size_feed_forward|transformers_version|task_specific_params"
    r"|(bos|eos|pad|sep|cls|mask|unk|decoder_start|forced_bos|forced_eos)_token_id"
    r"|output_\w+|summary_\w+|\w*dropout\w*|\w*(_pdrop|layerdrop|_drop)|\w*aux_loss_coef|\w*_loss_coef|initializer_\w+|init_std"
)


def architecture_fields(config: Any) -> Iterator[str]:
    """Fields of a configuration's own model type that decide what its weights compute, in alphabetical order."""
    from transformers import PreTrainedConfig

    general = _declared(PreTrainedConfig)
    for name in sorted(_declared(type(config)) - general):
        if not FREE_FIELDS.fullmatch(name):
            yield name


def check_same_architecture(base: Any, expert: Any, *, within: str = "") -> None:
    """See that two configurations are of one architecture.

    Args:
        base: Configuration of the base.
        expert: The expert's.
        within: Where both lie in a larger configuration, such as "text_config.".

    Raises:
        ConfigMismatchError: Naming the first field that differs and must not, both values, and what to do.
    """
    from transformers import PreTrainedConfig

    if base.model_type != expert.model_type:
        raise _differ(f"{within}model_type", base.model_type, expert.model_type)
    for name in architecture_fields(base):
        one, other = getattr(base, name, None), getattr(expert, name, None)
        if isinstance(one, PreTrainedConfig) and isinstance(other, PreTrainedConfig):
            check_same_architecture(one, other, within=f"{within}{name}.")
        elif isinstance(one, dict) and isinstance(other, dict):
            for key in sorted({*one, *other}, key=str):
                if one.get(key) != other.get(key):
                    raise _differ(f"{within}{name}.{key}", one.get(key), other.get(key))
        elif _plain(one) != _plain(other):
            raise _differ(f"{within}{name}", one, other)


def _differ(name: str, one: Any, other: Any) -> ConfigMismatchError:
    return ConfigMismatchError(
        f"base and expert differ in {name}: {one!r} and {other!r}; a delta is of weights alone, so pack against "
        f"the base that the expert was tuned from, with {name} = {other!r} in its config.json, or serve it on its own"
    )


def _declared(config: type) -> set[str]:
    names = set()
    for each in config.__mro__[:-1]:
        names |= set(getattr(each, "__annotations__", ()))
        if own := vars(each).get("__init__"):
            kinds = inspect.signature(own).parameters.values()
            names |= {p.name for p in kinds if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return names - {"self"}


def _plain(value: Any) -> Any:
    """A value as JSON would give it back, so that a tuple equals the list that it was saved as."""
    return list(value) if isinstance(value, tuple) else value
