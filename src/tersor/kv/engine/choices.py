"""What a cache layer is told: which tokens matter, how they are stored, how a prompt attends, and when to compress.

The module loads without torch, so that settings can be checked and saved without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from tersor._errors import TersorError

if TYPE_CHECKING:
    from torch import Tensor

    from tersor.kv.engine.call import AttentionCall
    from tersor.kv.selection.base import Selection
    from tersor.kv.storage.mixed import Storage

#: Settings of the engine that every method and recipe has.
ENGINE_OPTIONS = ("streaming_gap", "recent_fp_tokens", "min_tokens_to_compress", "skip_layers")

T = TypeVar("T")


class Prefill(Protocol):
    """How a layer attends while nothing of its sequence is compressed, and how a sparse one reads a later part.

    A frozen dataclass that holds no tensors.
    """

    @property
    def sparse(self) -> bool:
        """Whether tokens may be left out of a prompt's attention."""

    @property
    def protect_text(self) -> bool:
        """Whether only tokens that show an image or a video may be left out."""

    @property
    def by_threshold(self) -> bool:
        """Whether a threshold decides how many tokens take part, so that every row may have its own."""

    def takes_part(self, tokens: int) -> bool:
        """Whether a later part of a conversation, of so many tokens, is read sparsely, too."""

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Output, and weights or None, over what the layer holds.

        A prefill that leaves tokens out tells the layer before it computes the output which ones stay
        (`CompressedLayer.decide`), so that one choice serves both.
        """

    def operations(self, share: Any) -> Any:
        """Share of the attention's operations that is left where ``share`` of the tokens take part."""


@dataclass(frozen=True)
class DensePrefill:
    """Every token attends to every earlier one, by the library's own kernel."""

    sparse = False
    protect_text = False
    by_threshold = False

    def takes_part(self, tokens: int) -> bool:
        return False

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        return call.dense()

    def operations(self, share: Any) -> Any:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How a cache layer compresses.

    Args:
        selection: Which tokens matter.
        storage: In which form each kind of token is kept.
        prefill: How a prompt attends.
        streaming_gap: New tokens that make a segment; None never compresses them.
        recent_fp_tokens: Newest tokens that are never compressed.
        min_tokens_to_compress: Nothing is compressed before so many tokens are there; None lets every prompt wait.
        skip_layers: Layers kept at model precision.
        name: The method in reports.
        recipe: The settings that made these choices as JSON, under the name of their method; None for your own.

    Raises:
        ValueError: For an option outside its range.
    """

    name: str = "custom"
    selection: Selection
    storage: Storage
    prefill: Prefill = field(default_factory=DensePrefill)
    streaming_gap: int | None = 100
    recent_fp_tokens: int = 0
    min_tokens_to_compress: int | None = 32
    skip_layers: tuple[int, ...] = ()
    recipe: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_engine_options(self, never=True)

    @property
    def window(self) -> int:
        """Slots for new tokens that a layer makes at once; 0 where it never compresses them."""
        return 0 if self.streaming_gap is None else self.streaming_gap + self.recent_fp_tokens

    def starts_at(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens is long enough for its first compression."""
        return self.min_tokens_to_compress is None or tokens >= self.min_tokens_to_compress

    def fills_gap(self, tokens: int) -> bool:
        """Whether so many new tokens are to be compressed."""
        return self.streaming_gap is not None and tokens >= self.streaming_gap

    def fills_prompt(self, tokens: int) -> bool:
        """Whether a prompt of so many tokens is to be compressed."""
        return self.min_tokens_to_compress is not None and tokens >= self.min_tokens_to_compress


def pick(part: type[T], settings: Any, **others: Any) -> T:
    """A ``part`` of a method with those of its fields that ``settings`` have under the same name, and ``others``."""
    names = [each.name for each in fields(part)]  # type: ignore[arg-type]
    return part(**{name: getattr(settings, name) for name in names if hasattr(settings, name)} | others)


def check_setting(settings: Any, name: str, good: bool, allowed: str) -> None:
    """Raise `ValueError` that names the setting, its value and what is allowed, unless ``good``."""
    if not good:
        raise TersorError(f"{name}={getattr(settings, name)!r} must be {allowed}")


def check_words(settings: Any, **allowed: tuple[Any, ...]) -> None:
    """Raise `ValueError` unless each setting is one of the values listed for it."""
    for name, values in allowed.items():
        check_setting(settings, name, getattr(settings, name) in values, f"one of {values}")


def check_counts(settings: Any, **least: int) -> None:
    """Raise `ValueError` unless each setting is a whole number of at least the number given for it."""
    for name, smallest in least.items():
        value = getattr(settings, name)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= smallest
        check_setting(settings, name, whole, f"a whole number of at least {smallest}")


def check_layers(settings: Any) -> None:
    """Raise `ValueError` unless ``skip_layers`` are indices of layers."""
    indices = all(isinstance(index, int) and index >= 0 for index in settings.skip_layers)
    check_setting(settings, "skip_layers", indices, "layer indices, counted from 0")


def check_engine_options(settings: Any, *, never: bool = False) -> None:
    """Raise `ValueError` for an engine option outside its range; ``never`` allows None where it means never."""
    least = {"streaming_gap": 1, "recent_fp_tokens": 0, "min_tokens_to_compress": 1}
    for name in ("streaming_gap", "min_tokens_to_compress"):
        if never and getattr(settings, name) is None:
            del least[name]
    check_counts(settings, **least)
    check_layers(settings)
