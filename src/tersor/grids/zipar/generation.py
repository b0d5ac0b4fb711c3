"""ZipAR: several rows of an autoregressive image at once, on the model as it is (arXiv 2412.04062)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from tersor._compat import take_cache
from tersor._errors import TersorError, WrongTypeError
from tersor.grids.geometry import RasterGrid
from tersor.grids.zipar.adapters import Prefix, Size, find_adapter
from tersor.grids.zipar.attention import grouped
from tersor.grids.zipar.config import ZipARConfig
from tersor.grids.zipar.decoding import Decoder, statistics
from tersor.grids.zipar.requests import (
    Request,
    check_guidance,
    check_lengths,
    check_mode,
    check_prompt,
    find_size,
    own_inputs,
    prepare,
    take_guidance,
)


@dataclass
class ZipAROutput(ModelOutput):
    """What is returned with ``return_dict_in_generate=True``.

    Args:
        sequences: Prefix, image in raster order with end-of-row tokens in place, and the tokens that the model's image
            decoder expects after it; image ids only, ``[batch, rows * columns]``, for Janus and LlamaGen.
        scores: Processed scores ``[batch, vocabulary]`` of each cell, in raster order, with ``output_scores=True``.
        forward_passes: The prefix's pass counts.
        tokens_per_pass: Cells over passes.
        row_start_pass: The pass that decided each row's first token.
        window_used: How many passes each row started after the one above.
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
    window_size: int | str = ZipARConfig.window_size,
    adaptive: bool = ZipARConfig.adaptive,
    row_start: str = ZipARConfig.row_start,
    eol_token_id: int | None = None,
    generator: torch.Generator | None = None,
    **model_kwargs: Any,
) -> Tensor | ZipAROutput:
    """Decode an image: pass it as ``model.generate(..., custom_generate=tersor.zipar, grid_size=(90, 90))``.

    Processors, guidance, temperature and ``return_dict_in_generate`` come from ``generate`` as usual. Janus has a
    ``generate`` of its own: use `zipar_generate` there.

    Args:
        model: A model of the library.
        input_ids: The prompt, ``[batch, tokens]``.
        logits_processor: Given by ``generate``.
        stopping_criteria: Given by ``generate``; only ``max_time`` applies.
        generation_config: Given by ``generate``.
        grid_size: Rows and columns in tokens; may be left out where the model or the prompt fixes them.
        window_size: See `ZipARConfig`.
        adaptive: See `ZipARConfig`.
        row_start: See `ZipARConfig`.
        eol_token_id: The token that closes every row of a plain language model's images, if there is one.
        generator: Where draws come from; None is the global state, as in ``generate``.
        **model_kwargs: Given by ``generate``.

    Returns:
        Token ids ``[batch, tokens]``, or `ZipAROutput`.

    Raises:
        ValueError: Before the first forward, if the request cannot be met; the message says what can.
        TypeError: If the model's class has no adapter.
        TimeoutError: When ``max_time`` is over.
    """
    config = ZipARConfig(window_size=window_size, adaptive=adaptive, row_start=row_start)  # type: ignore[arg-type]
    adapter = find_adapter(model)(model)
    if adapter.own_vocabulary:
        raise TersorError(
            f"{type(model).__name__} has a generate of its own; call tersor.zipar_generate(model, inputs)"
        )
    check_mode(generation_config)
    # The library takes inputs on the CPU for a model elsewhere.
    input_ids, mask = input_ids.to(model.device), model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask.to(model.device)
    check_prompt(input_ids, mask, model_kwargs)
    size = find_size(adapter, grid_size, input_ids, model_kwargs.get("image_sizes"))
    eol = adapter.eol_id if eol_token_id is None else eol_token_id
    grid = RasterGrid(size[0] - adapter.decided_rows(input_ids, size), size[1], end_of_row=eol is not None)
    check_lengths(generation_config, input_ids.shape[1], grid)
    processors, guidance, null_ids, null_mask = take_guidance(list(logits_processor or []), input_ids)
    request = Request(adapter, grid, config, generation_config, processors, list(stopping_criteria or []), generator)
    prefix = adapter.prefix_of_ids(input_ids, mask, null_ids, null_mask)
    return _decode(request, prefix, guidance, cache=take_cache(model_kwargs), eol_id=eol)


#: Settings of `zipar` that are not the library's.
_SETTINGS = tuple(
    name
    for name, each in inspect.signature(zipar).parameters.items()
    if each.kind is each.KEYWORD_ONLY and name != "generator"
)


@torch.no_grad()
def zipar_generate(
    model: Any, inputs: Mapping[str, Any] | Tensor, *, generator: torch.Generator | None = None, **options: Any
) -> Tensor | ZipAROutput:
    """Decode an image with any supported model, Janus and LlamaGen included.

    Args:
        model: A model of a class with an adapter.
        inputs: What the model's processor gives (a mapping), or token ids ``[batch, tokens]``; for LlamaGen a mapping
            with ``class_labels``, or with ``text_features`` and ``text_mask``, or class labels ``[batch]``.
        generator: See `zipar`.
        **options: ``grid_size``, ``window_size``, ``adaptive``, ``row_start`` and ``eol_token_id``, see `zipar`; and
            options of the model's ``generate``, such as ``do_sample``, ``top_k`` or ``guidance_scale``.

    Returns:
        As `zipar`.

    Raises:
        ValueError, TypeError, TimeoutError: As `zipar`.

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
    settings = {name: options.pop(name) for name in _SETTINGS if name in options}
    config = _config(settings)
    adapter = find_adapter(model)(model)
    grid_size = settings.get("grid_size")
    for name in ("streamer", "assistant_model"):
        if options.pop(name, None) is not None:
            raise TersorError(f"{name} does not go with ZipAR: tokens are not decided in the order of the sequence")
    if not adapter.own_vocabulary:
        given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
        size = find_size(adapter, grid_size, given.get("input_ids"), given.get("image_sizes"))
        if not {"max_new_tokens", "max_length", "generation_config"} & set(options):
            options["max_new_tokens"] = size[0] * (size[1] + 1) + len(adapter.trailing_ids)
        # Of the class, not of the instance: that one may be patched with this function.
        return type(model).generate(model, **given, custom_generate=zipar, generator=generator, **settings, **options)
    if settings.get("eol_token_id") is not None:
        raise TersorError(f"{type(model).__name__}'s images have no end-of-row token; leave eol_token_id out")
    options.pop("generation_mode", None)
    grid = RasterGrid(*find_size(adapter, grid_size, None, None))
    generation_config, criteria, processors, rest = prepare(model, options)
    check_mode(generation_config)
    asked, generation_config.guidance_scale = generation_config.guidance_scale, None
    guidance = check_guidance(adapter.default_guidance if asked is None else asked)
    given = own_inputs(model, inputs, rest, generation_config.num_return_sequences or 1)
    if "input_ids" in given:
        check_prompt(given["input_ids"], given["attention_mask"], {})
    request = Request(adapter, grid, config, generation_config, processors, criteria, generator)
    return _decode(request, adapter.prefix(given, guided=guidance is not None), guidance)


def apply_zipar(model: Any, **settings: Any) -> Any:
    """Let ``model.generate`` decode images with ZipAR, on this instance only; returns the model.

    Calls that are for text pass through untouched: Emu3's without the image mark at the prompt's end, Janus's with
    another ``generation_mode`` than ``"image"``, and those of language models without ``grid_size``, here or in the
    call. Applying again replaces the settings; `remove_zipar` restores ``generate``.

    Args:
        model: A model of a class with an adapter.
        **settings: ``grid_size``, ``window_size``, ``adaptive``, ``row_start`` and ``eol_token_id``, see `zipar`.

    Raises:
        ValueError: If a setting is outside its range.
        TypeError: If the model's class has no adapter, or a setting is unknown.
    """
    if unknown := sorted(set(settings) - set(_SETTINGS)):
        raise WrongTypeError(f"apply_zipar has no settings {unknown}; it has {[*_SETTINGS]}")
    _config(settings)
    adapter = find_adapter(model)(model)
    remove_zipar(model)
    kept = {name: value for name, value in settings.items() if value is not None}
    previous, original = model.__dict__.get("generate"), model.generate

    @functools.wraps(original)
    def generate(inputs: Any = None, **options: Any) -> Any:
        names = (*adapter.inputs, "image_sizes", "pixel_values")
        mapping = {name: options[name] for name in names if name in options}
        if inputs is not None:
            mapping[adapter.inputs[0]] = inputs
        if not adapter.makes_image({**kept, **options, **mapping}):
            return original(inputs, **options)
        rest = {name: value for name, value in options.items() if name not in mapping}
        return zipar_generate(model, mapping, **{**kept, **rest})

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


def _config(settings: dict[str, Any]) -> ZipARConfig:
    """The part of `zipar`'s settings that is checked without a model."""
    return ZipARConfig(**{name: value for name, value in settings.items() if hasattr(ZipARConfig, name)})


def _decode(
    request: Request, prefix: Prefix, guidance: float | None, *, cache: Any = None, eol_id: int | None = None
) -> Tensor | ZipAROutput:
    """Run a request that is checked, but for the cache."""
    adapter, config = request.adapter, request.generation_config
    decoder = Decoder(
        adapter,
        prefix,
        request.frontier(),
        request.sampler(),
        request.cache_for(prefix, cache),
        eol_id=eol_id,
        guidance=guidance,
        pad_id=config.pad_token_id or 0,
        keep_scores=bool(config.return_dict_in_generate and config.output_scores),
        before_pass=request.stop_if_late,
    )
    with grouped(adapter.model):
        decoded = decoder.run()
    trailing = decoded.ids.new_tensor(adapter.trailing_ids).expand(decoded.ids.shape[0], -1)
    sequences = torch.cat([prefix.ids, decoded.ids, trailing], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    return ZipAROutput(sequences=sequences, scores=decoded.scores or None, **statistics(decoded, request.grid))
