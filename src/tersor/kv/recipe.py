"""What the paper recipes share: settings that can be checked, saved and read without loading torch."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any, Self

from tersor._errors import TersorError, UnsupportedError
from tersor.kv.engine.choices import ENGINE_OPTIONS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from tersor.kv.engine.cache import CompressedCache
    from tersor.kv.method import KVMethod
    from tersor.kv.session import Session

#: 16 stores tokens in model precision, 0 evicts them.
STORAGE_BITS = (0, 2, 3, 4, 8, 16)
#: Names of the precisions that minima, steps and scales may be stored in.
PARAM_DTYPES = ("float16", "bfloat16", "float32")


class Recipe:
    """Base of the recipes: frozen dataclasses of a paper's settings whose `method` makes the engine's choices."""

    def method(self) -> KVMethod:
        """The engine's four choices for these settings."""
        raise UnsupportedError(f"{type(self).__name__} makes no choices; override `method`")

    def choices(self) -> dict[str, str]:
        """Which of the engine's choices these settings make, and the setting that makes each; for `compose`."""
        raise UnsupportedError(f"{type(self).__name__} cannot be composed; override `choices`")

    def engine_options(self) -> dict[str, Any]:
        """The engine's settings that these settings ask for, for `compose`: those that are not at their default."""
        defaults = {field.name: field.default for field in fields(self)}  # type: ignore[arg-type]
        return {name: own for name in ENGINE_OPTIONS if (own := getattr(self, name)) != defaults[name]}

    def cache(self, config: PreTrainedConfig, *, offloading: bool = False) -> CompressedCache:
        """An empty cache for a model of this ``config``, to pass as ``past_key_values``."""
        return self.named_method().cache(config, offloading=offloading)

    def on(self, model: PreTrainedModel) -> Session:
        """A session for ``model``: use it in a ``with`` statement, or call `enable` and `disable`."""
        return self.named_method().on(model)

    def named_method(self) -> KVMethod:
        """`method`, with the settings as text, by which a saved cache names them."""
        return replace(self.method(), recipe=self.to_named_json())

    def to_json(self) -> str:
        """The settings as one JSON object."""
        return json.dumps(asdict(self), sort_keys=True)  # type: ignore[call-overload]

    def to_named_json(self) -> str:
        """The settings as JSON under the name of the method; `tersor.kv.settings.recipe_from_json` reads it."""
        return json.dumps({self.method().name: json.loads(self.to_json())}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read `to_json` back.

        Raises:
            ValueError: For unknown settings.
        """
        settings = json.loads(text)
        known = {each.name for each in fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(settings) - known):
            raise TersorError(f"{cls.__name__} has no settings {unknown}; it has {sorted(known)}")
        return cls(**{name: _tuples(value) for name, value in settings.items()})


def _tuples(value: Any) -> Any:
    """JSON has lists only; settings are immutable."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
