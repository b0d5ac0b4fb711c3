"""A call for images: checked before the first forward, and prepared as the library's ``generate`` does."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.generation import (
    EosTokenCriteria,
    GenerationMode,
    MaxLengthCriteria,
    MaxTimeCriteria,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from tersor._compat import cache_keyword
from tersor._errors import TersorError
from tersor.grids.conditions import as_classes
from tersor.grids.geometry import RasterGrid
from tersor.grids.raster.adapters import Prefix, RasterAdapter, Size, find_adapter
from tersor.grids.raster.slots import max_fed_tokens
from tersor.grids.sampling import Generators, Sampler, check_generators

#: What `generate` adds to a call where nobody set a length.
_DEFAULT_NEW_TOKENS = 20


class Settings(Protocol):
    """Settings of a way to decode, such as `ZipARConfig`."""

    @property
    def one_generator(self) -> bool:
        """Whether all images must be drawn from the same generator."""

    def check(self, grid: RasterGrid) -> None:
        """Raise `ValueError` for a grid that the settings do not go with."""


@dataclass(frozen=True)
class Request:
    """One call for images.

    Args:
        method: What decodes, in messages.
        adapter: Of the model.
        grid: Of the images, without rows that the prompt holds.
        config: Settings of the method.
        generation_config: The library's settings.
        processors: Change scores.
        criteria: May stop the call; only time counts.
        generator: Where draws come from.

    Raises:
        ValueError: If the settings do not go with the grid, or a criterion does not apply.
    """

    method: str
    adapter: RasterAdapter
    grid: RasterGrid
    config: Settings
    generation_config: Any
    processors: list[Any]
    criteria: list[Any]
    generator: Generators

    def __post_init__(self) -> None:
        self.config.check(self.grid)
        check_criteria(self.criteria)

    def sampler(self, images: int) -> Sampler:
        """What draws ``images`` images; raises `ValueError` unless there is one generator, or one for each."""
        check_generators(self.generator, images, self.adapter.model.device)
        if isinstance(self.generator, (list, tuple)) and self.config.one_generator:
            raise TersorError(f"generator is a list, and {self.config} tests all images together; give one")
        return Sampler(self.processors, bool(self.generation_config.do_sample), self.generator)

    def cache_for(self, prefix: Prefix, given: Any) -> Any:
        """The cache to decode with; the caller's is filled from it at the end, see `Slots.fill`.

        Raises:
            ValueError: If the model or the caller's cache cannot hold prefix and image.
        """
        config = self.adapter.model.config.get_text_config()
        implementation = getattr(config, "_attn_implementation", None)
        if implementation not in (None, "eager", "sdpa"):
            raise TersorError(
                f"attn_implementation={implementation!r} takes no 4-D mask, which {self.method} needs; "
                "load the model with attn_implementation='sdpa'"
            )
        last = int(prefix.starts.max()) + self.grid.offset(self.grid.rows - 1, self.grid.columns - 1)
        limit = self.adapter.max_positions
        if limit is not None and last > limit:
            raise TersorError(f"prompt and image need {last} positions, the model has {limit}; shorten the prompt")
        own = DynamicCache(config=config)
        for cache in (own,) if given is None else (own, given):
            plain = type(cache) in (DynamicCache, StaticCache) and not getattr(cache, "offloading", False)
            if not plain or any(type(layer) not in (DynamicLayer, StaticLayer) for layer in cache.layers):
                kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", [])})
                raise TersorError(
                    f"{type(cache).__name__} {kinds} does not go with {self.method}: sliding-window, quantized, "
                    "offloaded and compressed caches count on tokens coming in order; use DynamicCache or StaticCache"
                )
            if cache.get_seq_length() > 0:
                raise TersorError("the cache already holds tokens; start an image with an empty cache")
            needed = prefix.valid.shape[1] + max_fed_tokens(self.grid)
            static = (layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer))
            if (held := min(static, default=needed)) < needed:
                raise TersorError(f"StaticCache has {held} slots; prompt and image need {needed}: raise max_new_tokens")
        return own

    def stop_if_late(self, ids: Tensor) -> None:
        """See the function of this name."""
        stop_if_late(self.criteria, ids)


def check_criteria(criteria: list[Any]) -> None:
    """Raise `ValueError` for stopping criteria other than time and the library's own of length."""
    ignored = (MaxTimeCriteria, MaxLengthCriteria, EosTokenCriteria)
    if other := [type(each).__name__ for each in criteria if not isinstance(each, ignored)]:
        raise TersorError(f"stopping criteria {other} do not apply: an image is decoded whole; max_time does")


def stop_if_late(criteria: list[Any], ids: Tensor) -> None:
    """Raise `TimeoutError` when the time is over."""
    for each in criteria:
        if isinstance(each, MaxTimeCriteria) and bool(each(ids, None).all()):
            raise TimeoutError(f"max_time of {each.max_time} s is over before the image is complete")


def find_size(adapter: RasterAdapter, given: Any, input_ids: Tensor | None, image_sizes: Any) -> Size:
    """Rows and columns, from the call or the model; raises `ValueError` if they differ or there are none."""
    known = adapter.grid(input_ids, image_sizes)
    if given is not None and not (isinstance(given, (tuple, list)) and len(given) == 2):
        raise TersorError(f"grid_size={given!r} must be (rows, columns) in tokens")
    size = None if given is None else (given[0], given[1])
    if size is not None and known is not None and size != known and adapter.fixes_grid:
        raise TersorError(f"grid_size={size} does not match the {known} tokens that the model or prompt asks for")
    found = size or known
    if found is None:
        raise TersorError(
            f"{type(adapter.model).__name__} does not say how large its images are; "
            "give grid_size=(rows, columns) in tokens"
        )
    RasterGrid(*found)
    return found


def check_ids(input_ids: Any, model: Any) -> None:
    """Raise `ValueError` unless a prompt is token ids of ``model``, ``[batch, tokens]`` and at least one."""
    whole = isinstance(input_ids, Tensor) and not input_ids.is_floating_point() and input_ids.dtype != torch.bool
    if not whole or input_ids.ndim != 2 or input_ids.numel() == 0:
        given = f"{input_ids.dtype} {tuple(input_ids.shape)}" if isinstance(input_ids, Tensor) else repr(input_ids)
        raise TersorError(f"the prompt is {given}; images take ids, whole numbers [batch, tokens], at least 1")
    count = model.get_input_embeddings().weight.shape[0]
    if not 0 <= int(input_ids.min()) <= int(input_ids.max()) < count:
        raise TersorError(
            f"the prompt has ids from {int(input_ids.min())} to {int(input_ids.max())}; the model's go from 0 to "
            f"{count - 1}"
        )


def check_prompt(input_ids: Tensor, mask: Tensor, model_kwargs: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless the prompt is padded on the left, with nothing else to condition on."""
    if mask.shape != input_ids.shape:
        raise TersorError(
            f"attention_mask is {tuple(mask.shape)}, the prompt {tuple(input_ids.shape)}; give both alike"
        )
    if bool((mask[:, 1:] < mask[:, :-1]).any()) or bool((mask[:, -1] == 0).any()):
        raise TersorError("the prompt is padded on the right or has holes; pad on the left (padding_side='left')")
    known = {"attention_mask", "position_ids", cache_keyword(), "use_cache", "logits_to_keep", "image_sizes"}
    # The library hands an empty `mm_encoder_outputs` to mixed models.
    given = {name for name, value in model_kwargs.items() if not (value is None or value == {})}
    if other := sorted(given - known):
        raise TersorError(f"an image does not take {other}; it is conditioned on token ids only")


def check_token(eol_token_id: Any, model: Any) -> None:
    """Raise `ValueError` for an end-of-row token that the model's embeddings do not have."""
    count = model.get_input_embeddings().weight.shape[0]
    whole = isinstance(eol_token_id, int) and not isinstance(eol_token_id, bool)
    if eol_token_id is not None and not (whole and 0 <= eol_token_id < count):
        raise TersorError(f"eol_token_id={eol_token_id!r} must be a token of the model, from 0 to {count - 1}")


def check_mode(config: Any) -> None:
    """Raise `ValueError` unless the library's settings ask for sampling or greedy decoding, and for no inner states."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise TersorError(f"generation mode {mode.value!r} does not go with images; only sampling and greedy do")
    temperature = getattr(config, "temperature", None)
    if config.do_sample and temperature is not None and not 0 < temperature < math.inf:
        raise TersorError(f"temperature={temperature} must be a number above 0; do_sample=False is greedy")
    for name in ("output_attentions", "output_hidden_states", "output_logits"):
        if getattr(config, name, None):
            raise TersorError(f"{name} is not available: cells do not come in the order of the sequence; leave it out")


def check_lengths(config: Any, prompt_tokens: int, grid: RasterGrid) -> None:
    """An image is all or nothing."""
    asked = config.max_new_tokens
    if asked is None and config.max_length is not None:
        new = config.max_length - prompt_tokens
        asked = None if new == _DEFAULT_NEW_TOKENS else new
    if asked is not None and asked < grid.length - grid.end_of_row:
        raise TersorError(
            f"the generation length of {asked} new tokens is smaller than the image's {grid.length}; "
            "raise max_new_tokens: an image is decoded whole"
        )


def take_guidance(
    processors: list[Any], input_ids: Tensor, model: Any
) -> tuple[list[Any], float | None, Tensor | None, Tensor | None]:
    """Take the library's guidance out of the processors: it calls the model token by token.

    Returns:
        The other processors, scale, and the unconditional ids and mask ``[batch, tokens]``.
    """
    found = [each for each in processors if isinstance(each, UnbatchedClassifierFreeGuidanceLogitsProcessor)]
    if not found:
        return processors, None, None, None
    rest = [each for each in processors if each is not found[0]]
    context = found[0].unconditional_context
    ids = input_ids[:, -1:] if context["input_ids"] is None else context["input_ids"].to(input_ids.device)
    mask = context["attention_mask"]
    mask = torch.ones_like(ids) if mask is None else mask.to(input_ids.device)
    batch = input_ids.shape[0]
    if batch % ids.shape[0]:
        raise TersorError(f"negative_prompt_ids has {ids.shape[0]} rows for {batch} images; give one, or one a prompt")
    check_ids(ids, model)
    check_prompt(ids, mask, {})
    ids, mask = (each.repeat_interleave(batch // ids.shape[0], dim=0) for each in (ids, mask))
    return rest, check_guidance(found[0].guidance_scale), ids, mask


def check_guidance(scale: float | None) -> float | None:
    """None where there is nothing to guide."""
    if scale is not None and not scale >= 0:
        raise TersorError(f"guidance_scale={scale!r} must not be negative; 1 is no guidance")
    return None if scale is None or scale == 1 else float(scale)


def prepare(model: Any, options: dict[str, Any]) -> tuple[Any, list[Any], list[Any], dict[str, Any]]:
    """Config, stopping criteria, processors and what is left of the options, as ``generate`` prepares them.

    Guidance is left to the caller: the config has its scale, and no processor takes it.
    """
    extra, stops = options.pop("logits_processor", None), options.pop("stopping_criteria", None)
    asked = options.pop("max_new_tokens", None), options.pop("max_length", None)
    config, rest = model._prepare_generation_config(options.pop("generation_config", None), **options)
    if any(each is not None for each in asked):
        raise TersorError(
            f"{type(model).__name__}'s images have a fixed length; leave max_new_tokens and max_length out"
        )
    model._prepare_special_tokens(config, True, device=model.device)
    # Nothing but a prompt of length 0 precedes the image in what processors see.
    empty = torch.zeros(1, 0, dtype=torch.long, device=model.device)
    unguided = copy.copy(config)
    unguided.guidance_scale = None
    processors = model._get_logits_processor(
        generation_config=unguided,
        input_ids_seq_length=0,
        encoder_input_ids=empty,
        logits_processor=extra,
        device=model.device,
    )
    criteria = model._get_stopping_criteria(generation_config=config, stopping_criteria=stops or [])
    return config, list(criteria), list(processors), rest


def own_inputs(model: Any, inputs: Any, rest: dict[str, Any], copies: int) -> dict[str, Any]:
    """The conditioning of a model with its own inputs, each repeated ``copies`` times."""
    allowed = find_adapter(model).inputs
    given = {**inputs} if isinstance(inputs, Mapping) else {allowed[0]: inputs}
    given |= rest
    if unknown := sorted(name for name, value in given.items() if value is not None and name not in allowed):
        raise TersorError(f"{type(model).__name__} does not take {unknown} for an image; it takes {list(allowed)}")
    if given.get("input_ids") is not None:
        check_ids(given["input_ids"], model)
    if given.get("input_ids") is not None and given.get("attention_mask") is None:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    if given.get("class_labels") is not None:
        given["class_labels"] = as_classes(given["class_labels"], model.config.num_classes)
    tensors = {name: torch.as_tensor(value) for name, value in given.items() if value is not None}
    return {name: value.to(model.device).repeat_interleave(copies, dim=0) for name, value in tensors.items()}
