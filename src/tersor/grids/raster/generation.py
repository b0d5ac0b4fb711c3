"""Three ways to ask a raster model for images: ``custom_generate``, a call of one's own, and a patched ``generate``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor._compat import take_cache
from tersor._errors import TersorError, WrongTypeError
from tersor.grids.geometry import RasterGrid
from tersor.grids.raster.adapters import Prefix, find_adapter
from tersor.grids.raster.attention import with_grouped_attention
from tersor.grids.raster.decoding import RasterDecoder
from tersor.grids.raster.requests import (
    Request,
    check_guidance,
    check_ids,
    check_lengths,
    check_mode,
    check_prompt,
    check_token,
    find_size,
    own_inputs,
    prepare,
    take_guidance,
)
from tersor.grids.sampling import Generators, check_cfg_interval


@dataclass(frozen=True)
class Method:
    """A way to decode raster models.

    Args:
        name: In messages.
        function: Its ``custom_generate``, whose keywords beside ``generator`` are the settings that users may give.
        config: Class of its own settings; the others say what the image is.
        decoder: Makes the decoder of its settings, the grid, and what `RasterDecoder` takes.
        output: Class of what is returned with ``return_dict_in_generate=True``.
    """

    name: str
    function: Callable[..., Any]
    config: type[Any]
    decoder: Callable[..., RasterDecoder]
    output: type[Any]

    @functools.cached_property
    def settings(self) -> tuple[str, ...]:
        """Names of the settings that are not the library's."""
        parameters = inspect.signature(self.function).parameters.items()
        return tuple(name for name, each in parameters if each.kind is each.KEYWORD_ONLY and name != "generator")

    def configured(self, settings: Mapping[str, Any]) -> Any:
        """The part of the settings that is checked without a model."""
        return self.config(**{name: value for name, value in settings.items() if hasattr(self.config, name)})

    def custom_generate(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        *,
        generator: Generators,
        settings: dict[str, Any],
        model_kwargs: dict[str, Any],
    ) -> Any:
        """What ``model.generate(custom_generate=...)`` calls; the arguments are those of `tersor.zipar`."""
        config = self.configured(settings)
        adapter = find_adapter(model)(model)
        if adapter.own_vocabulary:
            name = self.function.__name__
            raise TersorError(
                f"{type(model).__name__} has a generate of its own; call tersor.{name}_generate(model, inputs)"
            )
        check_mode(generation_config)
        # The library takes inputs on the CPU for a model elsewhere.
        input_ids, mask = input_ids.to(model.device), model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask.to(model.device)
        check_ids(input_ids, model)
        check_prompt(input_ids, mask, model_kwargs)
        size = find_size(adapter, settings["grid_size"], input_ids, model_kwargs.get("image_sizes"))
        eol = adapter.eol_id if settings["eol_token_id"] is None else settings["eol_token_id"]
        check_token(eol, model)
        grid = RasterGrid(size[0] - adapter.decided_rows(input_ids, size), size[1], end_of_row=eol is not None)
        check_lengths(generation_config, input_ids.shape[1], grid)
        processors, guidance, null_ids, null_mask = take_guidance(list(logits_processor or []), input_ids, model)
        criteria = list(stopping_criteria or [])
        request = Request(self.name, adapter, grid, config, generation_config, processors, criteria, generator)
        prefix = adapter.prefix_of_ids(input_ids, mask, null_ids, null_mask)
        until, cache = settings["cfg_interval"], take_cache(model_kwargs)
        return self._decode(request, prefix, guidance, until, cache=cache, eol_id=eol)

    def generate(
        self, model: Any, inputs: Mapping[str, Any] | Tensor, *, generator: Generators, options: dict[str, Any]
    ) -> Any:
        """Decode an image with any supported model; the arguments are those of `tersor.zipar_generate`."""
        settings = {name: options.pop(name) for name in self.settings if name in options}
        config = self.configured(settings)
        adapter = find_adapter(model)(model)
        grid_size = settings.get("grid_size")
        for name in ("streamer", "assistant_model"):
            if options.pop(name, None) is not None:
                raise TersorError(f"{name} does not go with {self.name}: an image is decoded whole, without helpers")
        if not adapter.own_vocabulary:
            given = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
            check_ids(given.get("input_ids"), model)
            size = find_size(adapter, grid_size, given.get("input_ids"), given.get("image_sizes"))
            if not {"max_new_tokens", "max_length", "generation_config"} & set(options):
                options["max_new_tokens"] = size[0] * (size[1] + 1) + len(adapter.trailing_ids)
            # Of the class, not of the instance: that one may be patched with this method.
            return type(model).generate(
                model, **given, custom_generate=self.function, generator=generator, **settings, **options
            )
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
        request = Request(self.name, adapter, grid, config, generation_config, processors, criteria, generator)
        prefix = adapter.prefix(given, guided=guidance is not None)
        return self._decode(request, prefix, guidance, settings.get("cfg_interval", -1))

    def apply(self, model: Any, settings: dict[str, Any]) -> Any:
        """Patch ``generate`` of this instance; the arguments are those of `tersor.apply_zipar`."""
        if unknown := sorted(set(settings) - set(self.settings)):
            raise WrongTypeError(f"apply_{self.function.__name__} has no settings {unknown}; it has {[*self.settings]}")
        self.configured(settings)
        adapter = find_adapter(model)(model)
        remove(model)
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
            generator = rest.pop("generator", None)
            with torch.no_grad():
                return self.generate(model, mapping, generator=generator, options={**kept, **rest})

        generate._tersor_previous = previous  # type: ignore[attr-defined]
        model.generate = generate
        return model

    def _decode(
        self,
        request: Request,
        prefix: Prefix,
        guidance: float | None,
        guided_cells: int,
        *,
        cache: Any = None,
        eol_id: int | None = None,
    ) -> Any:
        """Run a request that is checked, but for the cache and where guidance ends."""
        check_cfg_interval(guided_cells, guidance)
        adapter, config = request.adapter, request.generation_config
        decoder = self.decoder(
            request.config,
            request.grid,
            adapter,
            prefix,
            request.sampler(prefix.ids.shape[0]),
            request.cache_for(prefix, cache),
            eol_id=eol_id,
            guidance=guidance,
            guided_cells=guided_cells,
            pad_id=config.pad_token_id or 0,
            keep_scores=bool(config.return_dict_in_generate and config.output_scores),
            before_pass=request.stop_if_late,
        )
        adapter.model = with_grouped_attention(adapter.model)
        decoded = decoder.run()
        if cache is not None:
            decoder.slots.fill(cache, decoder.cache, len(decoded.ids))
        trailing = decoded.ids.new_tensor(adapter.trailing_ids).expand(decoded.ids.shape[0], -1)
        sequences = torch.cat([prefix.ids, decoded.ids, trailing], dim=1)
        if not config.return_dict_in_generate:
            return sequences
        return self.output(sequences=sequences, scores=decoded.scores or None, **decoder.statistics(decoded))


def remove(model: Any) -> Any:
    """Undo `Method.apply`, of whichever method; a model without it stays as it is. Returns the model."""
    patched = model.__dict__.get("generate")
    if hasattr(patched, "_tersor_previous"):
        del model.generate
        if patched._tersor_previous is not None:
            model.generate = patched._tersor_previous
    return model
