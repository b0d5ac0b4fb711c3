"""Speculative Jacobi decoding of raster models, as they are (SJD arXiv 2410.01699, with kept drafts)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.utils import ModelOutput

from tersor.grids.geometry import RasterGrid
from tersor.grids.raster.adapters import Prefix, RasterAdapter, Size
from tersor.grids.raster.generation import Method, remove
from tersor.grids.sampling import Generators, Sampler
from tersor.grids.speculative.config import SpeculativeConfig
from tersor.grids.speculative.decoding import SpeculativeDecoder
from tersor.grids.speculative.paces import OwnPaces


@dataclass
class SpeculativeOutput(ModelOutput):
    """What is returned with ``return_dict_in_generate=True``.

    Args:
        sequences: Prefix, image in raster order with end-of-row tokens in place, and the tokens that the model's image
            decoder expects after it; image ids only, ``[batch, rows * columns]``, for Janus and LlamaGen.
        scores: Processed scores ``[batch, vocabulary]`` of each cell, in raster order, with ``output_scores=True``.
        forward_passes: The prefix's pass counts.
        tokens_per_pass: Cells over passes.
        fed_tokens: Tokens of an image that went through the model, drafts included, prefix not; the mean of a batch.
        cells_per_pass: How many cells each pass decided, counted when the last image of the batch has them.
        row_start_pass: The pass that decided each row's first token, of the last image too.
        acceptance: By row, the share of cells that hold the draft which they had before the pass that decided them.
    """

    sequences: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    forward_passes: int | None = None
    tokens_per_pass: float | None = None
    fed_tokens: int | None = None
    cells_per_pass: list[int] | None = None
    row_start_pass: list[int] | None = None
    acceptance: list[float] | None = None


@torch.no_grad()
def speculative(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    *,
    grid_size: Size | None = None,
    window_size: int | str = SpeculativeConfig.window_size,
    mode: str = SpeculativeConfig.mode,
    first_drafts: str = SpeculativeConfig.first_drafts,
    eol_token_id: int | None = None,
    cfg_interval: int = -1,
    generator: Generators = None,
    **model_kwargs: Any,
) -> Tensor | SpeculativeOutput:
    """Decode an image: pass it as ``model.generate(..., custom_generate=tersor.speculative, grid_size=(90, 90))``.

    Processors, guidance, temperature and ``return_dict_in_generate`` come from ``generate`` as usual. Janus has a
    ``generate`` of its own: use `speculative_generate` there.

    Args:
        model: A model of the library.
        input_ids: The prompt, ``[batch, tokens]``.
        logits_processor: Given by ``generate``.
        stopping_criteria: Given by ``generate``; only ``max_time`` applies.
        generation_config: Given by ``generate``.
        grid_size: Rows and columns in tokens; may be left out where the model or the prompt fixes them.
        window_size: See `SpeculativeConfig`.
        mode: See `SpeculativeConfig`.
        first_drafts: See `SpeculativeConfig`.
        eol_token_id: The token that closes every row of a plain language model's images, if there is one.
        cfg_interval: No guidance of cells that have more than so many before them in raster order; -1 guides all.
        generator: Where draws come from; None is the global state, as in ``generate``. A list has one for each image,
            so that an image does not depend on the others of its batch; in the mode "seed" only.
        **model_kwargs: Given by ``generate``.

    Returns:
        Token ids ``[batch, tokens]``, or `SpeculativeOutput`.

    Raises:
        ValueError: Before the first forward, if the request cannot be met; the message says what can.
        TypeError: If the model's class has no adapter.
        TimeoutError: When ``max_time`` is over.
    """
    settings = {
        "grid_size": grid_size,
        "window_size": window_size,
        "mode": mode,
        "first_drafts": first_drafts,
        "eol_token_id": eol_token_id,
        "cfg_interval": cfg_interval,
    }
    return _METHOD.custom_generate(
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        generator=generator,
        settings=settings,
        model_kwargs=model_kwargs,
    )


@torch.no_grad()
def speculative_generate(
    model: Any, inputs: Mapping[str, Any] | Tensor, *, generator: Generators = None, **options: Any
) -> Tensor | SpeculativeOutput:
    """Decode an image with any supported model, Janus and LlamaGen included.

    Args:
        model: A model of a class with an adapter.
        inputs: What the model's processor gives (a mapping), or token ids ``[batch, tokens]``; for LlamaGen a mapping
            with ``class_labels``, or with ``text_features`` and ``text_mask``, or class labels ``[batch]``.
        generator: See `speculative`.
        **options: ``grid_size``, ``window_size``, ``mode``, ``first_drafts``, ``eol_token_id`` and ``cfg_interval``,
            see `speculative`; and options of the model's ``generate``, such as ``do_sample`` or ``guidance_scale``.

    Returns:
        As `speculative`.

    Raises:
        ValueError, TypeError, TimeoutError: As `speculative`.

    Example:
        >>> import torch, tersor
        >>> from tersor.grids.llamagen import LlamaGen, LlamaGenConfig
        >>> sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> model = LlamaGen(LlamaGenConfig(**sizes, grid_size=(8, 8))).eval()
        >>> labels, seeded = torch.tensor([3]), lambda: torch.Generator().manual_seed(0)
        >>> ids = tersor.speculative_generate(model, labels, do_sample=True, generator=seeded())
        >>> torch.equal(ids, model.generate(labels, do_sample=True, generator=seeded()))
        True
    """
    return _METHOD.generate(model, inputs, generator=generator, options=options)


def apply_speculative(model: Any, **settings: Any) -> Any:
    """Let ``model.generate`` decode images speculatively, on this instance only; returns the model.

    Calls that are for text pass through untouched, see `tersor.apply_zipar`. Applying again replaces the settings, or
    ZipAR's; `remove_speculative` restores ``generate``.

    Args:
        model: A model of a class with an adapter.
        **settings: ``grid_size``, ``window_size``, ``mode``, ``first_drafts``, ``eol_token_id`` and ``cfg_interval``,
            see `speculative`.

    Raises:
        ValueError: If a setting is outside its range.
        TypeError: If the model's class has no adapter, or a setting is unknown.
    """
    return _METHOD.apply(model, settings)


def remove_speculative(model: Any) -> Any:
    """Undo `apply_speculative`; a model without it stays as it is. Returns the model."""
    return remove(model)


def _decoder(
    config: SpeculativeConfig, grid: RasterGrid, adapter: RasterAdapter, prefix: Prefix, sampler: Sampler, cache: Cache,
    **options: Any,
) -> SpeculativeDecoder:  # fmt: skip
    """Each image at its own pace where that can be, else all of them in lock-step."""
    images = len(prefix.ids)
    kind = OwnPaces if OwnPaces.takes(config, sampler, images, options) else SpeculativeDecoder
    return kind(config, grid, adapter, prefix, sampler, cache, **options)


_METHOD = Method("speculative decoding", speculative, SpeculativeConfig, _decoder, SpeculativeOutput)
