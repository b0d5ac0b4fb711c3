"""ZipAR: several rows of an autoregressive image at once, on the model as it is (arXiv 2412.04062)."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

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
from transformers.utils import ModelOutput

from tersor.grids.geometry import RasterGrid
from tersor.grids.sampling import Sampler
from tersor.grids.schedule import (
    ROW_STARTS,
    Frontier,
    check_window_size,
    resolve_row_start,
    resolve_window,
)
from tersor.grids.zipar.adapters import Prefix, RasterAdapter, find_adapter
from tersor.grids.zipar.attention import grouped
from tersor.grids.zipar.decoding import Decoder, max_fed_tokens, statistics
from tersor.grids.zipar.slots import SlotLayer

Size = tuple[int, int]
# What `generate` adds to a call where nobody set a length.
_DEFAULT_NEW_TOKENS = 20


@dataclass(frozen=True, kw_only=True)
class ZipARConfig:
    """How far rows run ahead.

    Args:
        window_size: columns of the row above that must be decided before a row starts: a number, or "quality" (2/3 of
            the columns), "balanced" (1/2) or "fast" (1/4). All columns is raster decoding.
        adaptive: verify each row's first token and let it wait while the model changes its mind; ``window_size`` is
            then the least distance.
        row_start: "eol" by the end-of-row token; without one "conservative" (row 1 waits for the whole of row 0, as
            in the authors' code) or "eager"; "auto" is the first of them that the model has.

    Raises:
        ValueError: for a setting outside its range.
    """

    window_size: int | str = "balanced"
    adaptive: bool = False
    row_start: Literal["auto", "eol", "conservative", "eager"] = "auto"

    def __post_init__(self) -> None:
        check_window_size(self.window_size)
        if not isinstance(self.adaptive, bool):
            raise ValueError(f"adaptive={self.adaptive!r} must be True or False")
        if self.row_start not in ("auto", *ROW_STARTS):
            raise ValueError(f"row_start={self.row_start!r} must be one of {('auto', *ROW_STARTS)}")

    def to_json(self) -> str:
        """The settings as one JSON object."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ZipARConfig:
        """Read `to_json` back; unknown settings raise `ValueError`."""
        settings = json.loads(text)
        known = {each.name for each in fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"ZipARConfig has no settings {unknown}; it has {sorted(known)}")
        return cls(**settings)


@dataclass
class ZipAROutput(ModelOutput):
    """What is returned with ``return_dict_in_generate=True``.

    Args:
        sequences: prefix, image in raster order with end-of-row tokens in place, and the tokens that the model's image
            decoder expects after it; image ids only, ``[batch, rows * columns]``, for Janus and LlamaGen.
        scores: processed scores ``[batch, vocabulary]`` a cell, in raster order, with ``output_scores=True``.
        forward_passes: the prefix's pass counts.
        tokens_per_pass: cells over passes.
        row_start_pass: the pass that decided each row's first token.
        window_used: how many passes each row started after the one above.
    """

    sequences: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    forward_passes: int | None = None
    tokens_per_pass: float | None = None
    row_start_pass: list[int] | None = None
    window_used: list[int] | None = None


@torch.no_grad()
def zipar(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    *,
    grid_size: Size | None = None,
    window_size: int | str = "balanced",
    adaptive: bool = False,
    row_start: str = "auto",
    eol_token_id: int | None = None,
    generator: torch.Generator | None = None,
    **model_kwargs: Any,
) -> Tensor | ZipAROutput:
    """Decode an image: pass it as ``model.generate(..., custom_generate=tersor.zipar, grid_size=(90, 90))``.

    Processors, guidance, temperature and ``return_dict_in_generate`` come from ``generate`` as usual. Janus has a
    ``generate`` of its own: use `zipar_generate` there.

    Args:
        grid_size: rows and columns in tokens; may be left out where the model or the prompt fixes them.
        window_size, adaptive, row_start: see `ZipARConfig`.
        eol_token_id: the token that closes every row of a plain language model's images, if there is one.
        generator: of the draws; None draws from the global state, as ``generate`` does.

    Returns:
        Token ids ``[batch, tokens]``, or `ZipAROutput`.

    Raises:
        ValueError: before the first forward, for a request that cannot be met; the message says what can.
        TypeError: for a model class without an adapter.
        TimeoutError: when ``max_time`` is over.
    """
    config = ZipARConfig(window_size=window_size, adaptive=adaptive, row_start=row_start)  # type: ignore[arg-type]
    adapter = find_adapter(model)(model)
    if adapter.own_vocabulary:
        raise ValueError(f"{type(model).__name__} has a generate of its own; call tersor.zipar_generate(model, inputs)")
    _check_mode(generation_config)
    # The library takes inputs on the CPU for a model elsewhere.
    input_ids, mask = input_ids.to(model.device), model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask.to(model.device)
    _check_prompt(input_ids, mask, model_kwargs)
    size = _find_size(adapter, grid_size, input_ids, model_kwargs.get("image_sizes"))
    eol = adapter.eol_id if eol_token_id is None else eol_token_id
    grid = RasterGrid(size[0] - adapter.decided_rows(input_ids, size), size[1], end_of_row=eol is not None)
    _check_lengths(generation_config, input_ids.shape[1], grid)
    processors, guidance, null_ids, null_mask = _take_guidance(list(logits_processor or []), input_ids)
    run = _Run(adapter, grid, config, generation_config, processors, list(stopping_criteria or []), generator)
    prefix = adapter.prefix_of_ids(input_ids, mask, null_ids, null_mask)
    run.check(model_kwargs.get("past_key_values"), prefix)
    return run.decode(prefix, guidance, eol)


@torch.no_grad()
def zipar_generate(
    model: Any,
    inputs: Mapping[str, Any] | Tensor,
    *,
    grid_size: Size | None = None,
    window_size: int | str = "balanced",
    adaptive: bool = False,
    row_start: str = "auto",
    eol_token_id: int | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor | ZipAROutput:
    """Decode an image with any supported model, Janus and LlamaGen included.

    Args:
        inputs: what the model's processor gives (a mapping), or token ids ``[batch, tokens]``; for LlamaGen a mapping
            with ``class_labels``, or with ``text_features`` and ``text_mask``, or class labels ``[batch]``.
        grid_size, window_size, adaptive, row_start, eol_token_id, generator: see `zipar`.
        options: of the model's ``generate``, such as ``do_sample``, ``top_k`` or ``guidance_scale``.

    Returns, raises:
        As `zipar`.

    Example:
        >>> import torch, tersor
        >>> from tersor.grids.llamagen import LlamaGen, LlamaGenConfig
        >>> sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> model = LlamaGen(LlamaGenConfig(**sizes, grid_size=(8, 8))).eval()
        >>> labels = {"class_labels": torch.tensor([3])}
        >>> out = tersor.zipar_generate(model, labels, window_size=3, return_dict_in_generate=True)
        >>> out.sequences.shape, out.forward_passes
        (torch.Size([1, 64]), 34)
    """
    settings = {"window_size": window_size, "adaptive": adaptive, "row_start": row_start}
    config = ZipARConfig(**settings)  # type: ignore[arg-type]
    adapter = find_adapter(model)(model)
    for name in ("streamer", "assistant_model"):
        if options.pop(name, None) is not None:
            raise ValueError(f"{name} does not go with ZipAR: tokens are not decided in the order of the sequence")
    if not adapter.own_vocabulary:
        given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
        size = _find_size(adapter, grid_size, given.get("input_ids"), given.get("image_sizes"))
        if not {"max_new_tokens", "max_length", "generation_config"} & set(options):
            options["max_new_tokens"] = size[0] * (size[1] + 1) + len(adapter.trailing_ids)
        # Of the class, not of the instance: that one may be patched with this function.
        return type(model).generate(
            model,
            **given,
            custom_generate=zipar,
            grid_size=grid_size,
            eol_token_id=eol_token_id,
            generator=generator,
            **settings,
            **options,
        )
    if eol_token_id is not None:
        raise ValueError(f"{type(model).__name__}'s images have no end-of-row token; leave eol_token_id out")
    options.pop("generation_mode", None)
    grid = RasterGrid(*_find_size(adapter, grid_size, None, None))
    generation_config, criteria, processors, rest = _prepare(model, options)
    _check_mode(generation_config)
    asked, generation_config.guidance_scale = generation_config.guidance_scale, None
    guidance = _check_guidance(adapter.default_guidance if asked is None else asked)
    given = _own_inputs(model, inputs, rest, generation_config.num_return_sequences or 1)
    if "input_ids" in given:
        _check_prompt(given["input_ids"], given["attention_mask"], {})
    run = _Run(adapter, grid, config, generation_config, processors, criteria, generator)
    prefix = adapter.prefix(given, guided=guidance is not None)
    run.check(None, prefix)
    return run.decode(prefix, guidance, None)


def apply_zipar(
    model: Any,
    *,
    grid_size: Size | None = None,
    window_size: int | str = "balanced",
    adaptive: bool = False,
    row_start: str = "auto",
    eol_token_id: int | None = None,
) -> Any:
    """Let ``model.generate`` decode images with ZipAR, on this instance only; returns the model.

    Calls that are for text pass through untouched: Emu3's without the image mark at the prompt's end, Janus's with
    another ``generation_mode`` than ``"image"``, and those of language models without ``grid_size``, here or in the
    call. Applying again replaces the settings; `remove_zipar` restores ``generate``.

    Raises:
        ValueError, TypeError: for bad settings, or a model class without an adapter.
    """
    settings = {"window_size": window_size, "adaptive": adaptive, "row_start": row_start}
    ZipARConfig(**settings)  # type: ignore[arg-type]
    adapter = find_adapter(model)(model)
    remove_zipar(model)
    given = {**settings, "grid_size": grid_size, "eol_token_id": eol_token_id}
    given = {name: value for name, value in given.items() if value is not None}
    previous, original = model.__dict__.get("generate"), model.generate

    @functools.wraps(original)
    def generate(inputs: Any = None, **options: Any) -> Any:
        names = (*adapter.inputs, "image_sizes", "pixel_values")
        mapping = {name: options[name] for name in names if name in options}
        if inputs is not None:
            mapping[adapter.inputs[0]] = inputs
        if not adapter.makes_image({**given, **options, **mapping}):
            return original(inputs, **options)
        rest = {name: value for name, value in options.items() if name not in mapping}
        return zipar_generate(model, mapping, **{**given, **rest})

    generate._tersor_previous = previous  # type: ignore[attr-defined]
    model.generate = generate
    return model


def remove_zipar(model: Any) -> Any:
    """Undo `apply_zipar`; a model without it stays as it is. Returns the model."""
    patched = model.__dict__.get("generate")
    if hasattr(patched, "_tersor_previous"):
        del model.generate
        if patched._tersor_previous is not None:
            model.generate = patched._tersor_previous
    return model


class _Run:
    """One request: checked first, decoded then."""

    def __init__(
        self,
        adapter: RasterAdapter,
        grid: RasterGrid,
        config: ZipARConfig,
        generation_config: Any,
        processors: list[Any],
        criteria: list[Any],
        generator: torch.Generator | None,
    ) -> None:
        if isinstance(config.window_size, int) and config.window_size > grid.columns:
            warnings.warn(
                f"window_size={config.window_size} is more than the grid's {grid.columns} columns: raster decoding",
                stacklevel=3,
            )
        window = resolve_window(config.window_size, grid.columns)
        self.frontier = Frontier(grid, window, resolve_row_start(config.row_start, grid), adaptive=config.adaptive)
        self.adapter, self.grid, self.generation_config = adapter, grid, generation_config
        self.sampler = Sampler(processors, bool(generation_config.do_sample), generator)
        self.criteria = [each for each in criteria if isinstance(each, MaxTimeCriteria)]
        ignored = (MaxTimeCriteria, MaxLengthCriteria, EosTokenCriteria)
        if other := [type(each).__name__ for each in criteria if not isinstance(each, ignored)]:
            raise ValueError(f"stopping criteria {other} do not apply: an image is decoded whole; max_time does")
        self.cache: Any = None

    def check(self, cache: Any, prefix: Prefix) -> None:
        """Raise `ValueError` if the model or the caller's cache (None: a new one) cannot hold prefix and image."""
        config = self.adapter.model.config.get_text_config()
        implementation = getattr(config, "_attn_implementation", None)
        if implementation not in (None, "eager", "sdpa"):
            raise ValueError(
                f"attn_implementation={implementation!r} takes no 4-D mask, which ZipAR needs; "
                "load the model with attn_implementation='sdpa'"
            )
        last = int(prefix.starts.max()) + self.grid.offset(self.grid.rows - 1, self.grid.columns - 1)
        limit = self.adapter.max_positions
        if limit is not None and last > limit:
            raise ValueError(f"prompt and image need {last} positions, the model has {limit}; shorten the prompt")
        self.cache = DynamicCache(config=config) if cache is None else cache
        self._check_cache(prefix.valid.shape[1])

    def _check_cache(self, prefix_tokens: int) -> None:
        cache = self.cache
        plain = type(cache) in (DynamicCache, StaticCache) and not getattr(cache, "offloading", False)
        if not plain or any(type(layer) not in (DynamicLayer, StaticLayer, SlotLayer) for layer in cache.layers):
            kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", [])})
            raise ValueError(
                f"{type(cache).__name__} {kinds} does not go with ZipAR: sliding-window, quantized, offloaded and "
                "compressed caches count on tokens coming in order; use DynamicCache or StaticCache"
            )
        if cache.get_seq_length() > 0:
            raise ValueError("past_key_values already holds tokens; start an image with an empty cache")
        needed = prefix_tokens + max_fed_tokens(self.grid)
        held = min((layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)), default=needed)
        if held < needed:
            raise ValueError(f"StaticCache has {held} slots; prompt and image need {needed}: raise max_new_tokens")

    def decode(self, prefix: Prefix, guidance: float | None, eol: int | None) -> Tensor | ZipAROutput:
        config = self.generation_config
        decoder = Decoder(
            self.adapter,
            prefix,
            self.frontier,
            self.sampler,
            self.cache,
            eol_id=eol,
            guidance=guidance,
            pad_id=config.pad_token_id or 0,
            keep_scores=bool(config.return_dict_in_generate and config.output_scores),
            before_pass=self._stop_if_late if self.criteria else None,
        )
        with grouped(self.adapter.model):
            decoded = decoder.run()
        trailing = decoded.ids.new_tensor(self.adapter.trailing_ids).expand(decoded.ids.shape[0], -1)
        sequences = torch.cat([prefix.ids, decoded.ids, trailing], dim=1)
        if not config.return_dict_in_generate:
            return sequences
        scores = decoded.scores or None
        return ZipAROutput(sequences=sequences, scores=scores, **statistics(decoded, self.grid))

    def _stop_if_late(self, ids: Tensor) -> None:
        for each in self.criteria:
            if bool(each(ids, None).all()):
                raise TimeoutError(f"max_time of {each.max_time} s is over before the image is complete")


def _find_size(adapter: RasterAdapter, given: Any, input_ids: Tensor | None, image_sizes: Any) -> Size:
    """Rows and columns, from the call or the model; raises `ValueError` if they differ or there are none."""
    known = adapter.grid(input_ids, image_sizes)
    if given is not None and len(given) != 2:
        raise ValueError(f"grid_size={given!r} must be (rows, columns) in tokens")
    size = None if given is None else (given[0], given[1])
    if size is not None and known is not None and size != known and adapter.fixes_grid:
        raise ValueError(f"grid_size={size} does not match the {known} tokens that the model or prompt asks for")
    found = size or known
    if found is None:
        raise ValueError(
            f"{type(adapter.model).__name__} does not say how large its images are; "
            "give grid_size=(rows, columns) in tokens"
        )
    RasterGrid(*found)
    return found


def _check_prompt(input_ids: Tensor, mask: Tensor, model_kwargs: Mapping[str, Any]) -> None:
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"the prompt has shape {tuple(input_ids.shape)}; ZipAR takes ids [batch, tokens], at least 1")
    if bool((mask[:, 1:] < mask[:, :-1]).any()) or bool((mask[:, -1] == 0).any()):
        raise ValueError("the prompt is padded on the right or has holes; pad on the left (padding_side='left')")
    known = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "image_sizes"}
    # The library hands an empty `mm_encoder_outputs` to mixed models.
    given = {name for name, value in model_kwargs.items() if not (value is None or value == {})}
    if other := sorted(given - known):
        raise ValueError(f"ZipAR does not take {other}; it conditions on token ids only")


def _check_mode(config: Any) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise ValueError(f"generation mode {mode.value!r} does not go with ZipAR; only sampling and greedy do")
    for name in ("output_attentions", "output_hidden_states", "output_logits"):
        if getattr(config, name, None):
            raise ValueError(f"{name} is not available: cells do not come in the order of the sequence; leave it out")


def _check_lengths(config: Any, prompt_tokens: int, grid: RasterGrid) -> None:
    """An image is all or nothing."""
    asked = config.max_new_tokens
    if asked is None and config.max_length is not None:
        new = config.max_length - prompt_tokens
        asked = None if new == _DEFAULT_NEW_TOKENS else new
    if asked is not None and asked < grid.length - grid.end_of_row:
        raise ValueError(
            f"the generation length of {asked} new tokens is smaller than the image's {grid.length}; "
            "raise max_new_tokens: an image is decoded whole"
        )


def _take_guidance(
    processors: list[Any], input_ids: Tensor
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
        raise ValueError(f"negative_prompt_ids has {ids.shape[0]} rows for {batch} images; give one, or one a prompt")
    _check_prompt(ids, mask, {})
    ids, mask = (each.repeat_interleave(batch // ids.shape[0], dim=0) for each in (ids, mask))
    return rest, _check_guidance(found[0].guidance_scale), ids, mask


def _check_guidance(scale: float | None) -> float | None:
    """None where there is nothing to guide."""
    if scale is not None and not scale >= 0:
        raise ValueError(f"guidance_scale={scale!r} must not be negative; 1 is no guidance")
    return None if scale is None or scale == 1 else float(scale)


def _prepare(model: Any, options: dict[str, Any]) -> tuple[Any, list[Any], list[Any], dict[str, Any]]:
    """Config, stopping criteria, processors and what is left of the options, as ``generate`` prepares them.

    Guidance is left to the caller: the config has its scale, and no processor takes it.
    """
    extra, stops = options.pop("logits_processor", None), options.pop("stopping_criteria", None)
    asked = options.pop("max_new_tokens", None), options.pop("max_length", None)
    config, rest = model._prepare_generation_config(options.pop("generation_config", None), **options)
    if any(each is not None for each in asked):
        raise ValueError(
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


def _own_inputs(model: Any, inputs: Mapping[str, Any] | Tensor, rest: dict[str, Any], copies: int) -> dict[str, Any]:
    """The conditioning of a model with its own inputs, each repeated ``copies`` times."""
    allowed = find_adapter(model).inputs
    given = {allowed[0]: inputs} if isinstance(inputs, Tensor) else {**inputs}
    given |= rest
    if unknown := sorted(name for name, value in given.items() if value is not None and name not in allowed):
        raise ValueError(f"{type(model).__name__} does not take {unknown} for an image; it takes {list(allowed)}")
    if given.get("input_ids") is not None and given.get("attention_mask") is None:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    tensors = {name: value for name, value in given.items() if value is not None}
    return {name: value.to(model.device).repeat_interleave(copies, dim=0) for name, value in tensors.items()}
