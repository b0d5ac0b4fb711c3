"""What the decoder has to know about a model class: one adapter each, and a registry."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tersor._compat import with_cache
from tersor._errors import TersorError, UnsupportedError, WrongTypeError
from tersor.grids.raster.attention import view

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

Size = tuple[int, int]


@dataclass(frozen=True)
class Prefix:
    """What the image is conditioned on; with guidance the unconditional branch follows as further rows.

    Args:
        embeddings: ``[rows, tokens, width]``, padded on the left.
        valid: Bool ``[rows, tokens]``, False for padding.
        positions: ``[rows, tokens]``.
        starts: ``[rows]``, the position of the first image token.
        ids: ``[batch, tokens]`` that come before the image in what processors see and what is returned; no tokens
            where the image's ids are a vocabulary of their own.
    """

    embeddings: Tensor
    valid: Tensor
    positions: Tensor
    starts: Tensor
    ids: Tensor

    @classmethod
    def padded(cls, embeddings: Tensor, valid: Tensor, ids: Tensor) -> Prefix:
        """Positions as the library counts them: from 0 at each row's first token that is no padding."""
        positions = (valid.long().cumsum(-1) - 1).clamp_min(0)
        return cls(embeddings, valid, positions, valid.sum(-1), ids)


class RasterAdapter:
    """A decoder-only language model whose vocabulary holds the image's tokens; subclass it for other models.

    Override what differs, and make it known with `register_adapter`.

    Args:
        model: The model; an adapter is made for one run.

    Attributes:
        inputs: What the model is conditioned on, the main one first.
        fixes_grid: Whether another grid than `grid` finds is an error.
        own_vocabulary: Image ids are a vocabulary of their own. Then processors see only them, and only they are
            returned; and the conditioning comes from `prefix` instead of token ids.
        default_guidance: Guidance where the model's generation config has none.
        trailing_ids: Tokens that the model's image decoder expects after the image.
        allowed_ids: Ids that a cell may hold, in increasing order; None is any.
        eol_id: The end-of-row token, None if there is none or the user has to give it.
    """

    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    own_vocabulary = False
    fixes_grid = True
    default_guidance: float | None = None
    trailing_ids: tuple[int, ...] = ()
    allowed_ids: list[int] | None = None
    eol_id: int | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def makes_image(self, options: Mapping[str, Any]) -> bool:
        """Whether a call of ``generate`` with these inputs and options is for an image, for `apply_zipar`."""
        return options.get("grid_size") is not None

    @cached_property
    def _selects_logits(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @property
    def max_positions(self) -> int | None:
        """Positions that the model has, None if there is no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def grid(self, input_ids: Tensor | None, image_sizes: Any = None) -> Size | None:
        """Rows and columns where the model or the prompt fixes them.

        Raises:
            ValueError: If samples of one batch differ.
        """
        return None

    def decided_rows(self, input_ids: Tensor, grid: Size) -> int:
        """Rows of the image that the prompt already holds.

        Raises:
            ValueError: If it ends inside a row.
        """
        return 0

    def embed_prompt(self, ids: Tensor) -> Tensor:
        """Embeddings ``[batch, tokens, width]`` of token ids of the prompt."""
        return self.model.get_input_embeddings()(ids)

    def embed_image(self, ids: Tensor) -> Tensor:
        """Embeddings ``[batch, tokens, width]`` of ids of image and end-of-row tokens."""
        return self.embed_prompt(ids)

    def logits(self, embeddings: Tensor, positions: Tensor, mask: Tensor, cache: Cache, keep: list[int]) -> Tensor:
        """One forward pass.

        Args:
            embeddings: ``[batch, tokens, width]``.
            positions: ``[batch, tokens]``.
            mask: Additive, ``[batch, 1, tokens, slots]``.
            cache: Holds what was fed before.
            keep: The tokens whose logits are wanted.

        Returns:
            ``[batch, len(keep), vocabulary]`` over the image's ids.
        """
        # The prompt's other logits would take memory for nothing; models that cannot leave them out compute them.
        selects = self._selects_logits and len(keep) < embeddings.shape[1]
        selection = {"logits_to_keep": torch.tensor(keep, device=embeddings.device)} if selects else {}
        logits = self.model(
            inputs_embeds=embeddings,
            position_ids=positions,
            attention_mask=mask,
            **with_cache(cache),
            use_cache=True,
            **selection,
        ).logits
        return logits if logits.shape[1] == len(keep) else logits[:, keep]

    def prefix_of_ids(
        self, ids: Tensor, mask: Tensor, null_ids: Tensor | None = None, null_mask: Tensor | None = None
    ) -> Prefix:
        """The conditioning from token ids ``[batch, tokens]``; with ``null_ids`` also the unconditional branch.

        The two may differ in length: the shorter is padded on the left.
        """
        both, valid = ids, mask.bool()
        if null_ids is not None and null_mask is not None:
            width = max(ids.shape[1], null_ids.shape[1])
            both = torch.cat([_pad_left(each, width) for each in (ids, null_ids)])
            valid = torch.cat([_pad_left(each.bool(), width) for each in (mask, null_mask)])
        seen = ids[:, :0] if self.own_vocabulary else ids
        return Prefix.padded(self.embed_prompt(both), valid, seen)

    def prefix(self, inputs: Mapping[str, Any], *, guided: bool) -> Prefix:
        """The conditioning from a model's own inputs, for models with a vocabulary of their own for images."""
        raise UnsupportedError(f"{type(self).__name__} takes token ids")


class Emu3Adapter(RasterAdapter):
    """`Emu3ForConditionalGeneration`: the prompt names the grid, every row ends with a token."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        names = model.config.vocabulary_map
        self.eol_id = model.vocabulary_mapping.eol_token_id
        self.allowed_ids = model.vocabulary_mapping.image_tokens
        self._start, self._wrapper = names.get("<|image start|>"), names.get("<|image token|>")
        # `decode_image_tokens` drops the last three: end of file, end of image, end of sequence.
        end = model.config.get_text_config().eos_token_id
        end = end[0] if isinstance(end, (list, tuple)) else end
        trailing = (names.get("<|extra_201|>"), names.get("<|image end|>"), end)
        self.trailing_ids = tuple(self.eol_id if each is None else each for each in trailing)

    def makes_image(self, options: Mapping[str, Any]) -> bool:
        # The processor ends the prompt with this mark when it is asked for image generation.
        ids = options.get("input_ids")
        asked = ids is not None and self._wrapper is not None and bool((ids[:, -1] == self._wrapper).all())
        return asked or super().makes_image(options)

    def grid(self, input_ids: Tensor | None, image_sizes: Any = None) -> Size | None:
        prompted = None if input_ids is None else _only([self._prompted(row) for row in input_ids.tolist()])
        # Already in tokens when the processor was asked for image generation.
        given = None if image_sizes is None else _only([(int(h), int(w)) for h, w in image_sizes])
        if prompted is not None and given is not None and prompted != given:
            raise TersorError(f"image_sizes is {given} and the prompt asks for {prompted} tokens; give both alike")
        return prompted or given

    def decided_rows(self, input_ids: Tensor, grid: Size) -> int:
        if self._wrapper is None:
            return 0
        stride = grid[1] + 1
        done = _only([row[::-1].index(self._wrapper) if self._wrapper in row else 0 for row in input_ids.tolist()]) or 0
        if done % stride or done >= grid[0] * stride:
            raise TersorError(
                f"the prompt holds {done} tokens of the image; only whole rows of {stride} tokens, the end-of-row "
                f"token included, can be continued, and fewer than {grid[0]} of them"
            )
        return done // stride

    def _prompted(self, ids: list[int]) -> Size | None:
        """The size that the prompt spells out between its image marks, such as ``90*90``."""
        if self._start not in ids or self._wrapper not in ids:
            return None
        first = len(ids) - ids[::-1].index(self._start)
        last = len(ids) - 1 - ids[::-1].index(self._wrapper)
        names = {index: name for name, index in self.model.config.vocabulary_map.items()}
        found = re.fullmatch(r"(\d+)\*(\d+)", "".join(names.get(each, "?") for each in ids[first:last]))
        return (int(found[1]), int(found[2])) if found else None


class JanusAdapter(RasterAdapter):
    """`JanusForConditionalGeneration`: image tokens have embeddings, a head and ids of their own."""

    own_vocabulary = True
    default_guidance = 5.0

    def makes_image(self, options: Mapping[str, Any]) -> bool:
        return options.get("generation_mode") == "image"

    def grid(self, input_ids: Tensor | None, image_sizes: Any = None) -> Size | None:
        tokens = self.model.model.vision_model.config.num_image_tokens
        side = round(tokens**0.5)
        return side, tokens // side

    def embed_image(self, ids: Tensor) -> Tensor:
        return self.model.prepare_embeddings_for_image_generation(ids)

    def logits(self, embeddings: Tensor, positions: Tensor, mask: Tensor, cache: Cache, keep: list[int]) -> Tensor:
        hidden = self.model.model.language_model(
            inputs_embeds=embeddings,
            position_ids=positions,
            attention_mask=mask,
            **with_cache(cache),
            use_cache=True,
        ).last_hidden_state
        return self.model.model.generation_head(hidden[:, keep])

    def prefix(self, inputs: Mapping[str, Any], *, guided: bool) -> Prefix:
        ids, mask = _prompt(inputs)
        if not guided:
            return self.prefix_of_ids(ids, mask)
        config = self.model.generation_config
        kept = (ids == config.bos_token_id) | (ids == config.generation_kwargs["boi_token_id"])
        return self.prefix_of_ids(ids, mask, torch.where(kept, ids, config.pad_token_id), mask)


class ImageGPTAdapter(RasterAdapter):
    """`ImageGPTForCausalImageModeling`: learned positions, one start token, square images unless said otherwise."""

    fixes_grid = False

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._blocks = [_unordered(block) for block in model.transformer.h]

    def grid(self, input_ids: Tensor | None, image_sizes: Any = None) -> Size | None:
        side = round(self.model.config.n_positions**0.5)
        return (side, side) if side * side == self.model.config.n_positions else None

    def logits(self, embeddings: Tensor, positions: Tensor, mask: Tensor, cache: Cache, keep: list[int]) -> Tensor:
        # The class flattens a 4-D mask to two dimensions, so its blocks are called one by one.
        transformer = self.model.transformer
        hidden = transformer.drop(embeddings + transformer.wpe(positions))
        for block in self._blocks:
            hidden = block(hidden, cache, mask)[0]
        return self.model.lm_head(transformer.ln_f(hidden)[:, keep])


def _unordered(block: Any) -> Any:
    """A view of a block without its own mask, which takes the last slots for the pass's tokens.

    One that is fed again has another slot.
    """
    if {"forward"} & (vars(block).keys() | vars(block.attn).keys()):
        raise UnsupportedError("the blocks of this ImageGPT are wrapped; load it on one device, without device_map")
    bias = block.attn.bias
    return view(block, lambda part: {"bias": bias.new_ones(()).expand_as(bias)} if part is block.attn else {})


class LlamaGenAdapter(RasterAdapter):
    """`tersor.grids.llamagen.LlamaGen`: conditioned on a class or on text features."""

    inputs = ("class_labels", "text_features", "text_mask")
    own_vocabulary = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.default_guidance = model.config.default_guidance

    def makes_image(self, options: Mapping[str, Any]) -> bool:
        return True

    @property
    def max_positions(self) -> int | None:
        return None  # rotary angles come from row and column

    def grid(self, input_ids: Tensor | None, image_sizes: Any = None) -> Size | None:
        return tuple(self.model.config.grid_size)

    def embed_image(self, ids: Tensor) -> Tensor:
        return self.model.tok_embeddings(ids)

    def prefix(self, inputs: Mapping[str, Any], *, guided: bool) -> Prefix:
        embeddings, valid = self.model.condition(**inputs, guided=guided)
        rows, tokens = valid.shape
        # The image starts after all of the prefix, padding included.
        positions = torch.arange(tokens, device=valid.device).expand(rows, tokens)
        starts = torch.full((rows,), tokens, device=valid.device)
        batch = rows // 2 if guided else rows
        return Prefix(embeddings, valid, positions, starts, starts.new_zeros(batch, 0))


#: By name for classes of transformers, so that none is imported before it is used.
_ADAPTERS: dict[str | type, type[RasterAdapter]] = {
    "Emu3ForConditionalGeneration": Emu3Adapter,
    "JanusForConditionalGeneration": JanusAdapter,
    "ImageGPTForCausalImageModeling": ImageGPTAdapter,
    "GPT2LMHeadModel": RasterAdapter,
    "LlamaGen": LlamaGenAdapter,
}
_REFUSED = {
    "GlmImageForConditionalGeneration": "its positions have three axes and may describe two grids at once",
    "ChameleonForConditionalGeneration": "its forward sets the score of every image token to minus infinity",
}


def register_adapter(model_class: type, adapter: type[RasterAdapter]) -> None:
    """Decode models of ``model_class``, and of classes derived from it, through ``adapter``.

    Raises:
        TypeError: If it is no subclass of `RasterAdapter`.
    """
    if not (isinstance(adapter, type) and issubclass(adapter, RasterAdapter)):
        raise WrongTypeError(f"an adapter is a subclass of RasterAdapter, got {adapter!r}")
    _ADAPTERS[model_class] = adapter


def find_adapter(model: Any) -> type[RasterAdapter]:
    """The adapter class for ``model``.

    Raises:
        TypeError: If the model decodes no images token by token in raster order, with the reason if known.
    """
    if type(model).__module__.startswith("transformers_modules.") and type(model) not in _ADAPTERS:
        raise WrongTypeError(
            f"{type(model).__name__} is remote code, whose forward may rely on consecutive positions; test it, "
            "then register_adapter(its class, an adapter)"
        )
    for each in type(model).__mro__:
        if each in _ADAPTERS:
            return _ADAPTERS[each]
        if each.__module__.startswith(("transformers.", "tersor.")):
            if each.__name__ in _REFUSED:
                raise WrongTypeError(f"{each.__name__} is not supported: {_REFUSED[each.__name__]}")
            if each.__name__ in _ADAPTERS:
                return _ADAPTERS[each.__name__]
            if each.__name__.endswith("ForCausalLM") and _takes_positions(model):
                return RasterAdapter
    raise WrongTypeError(
        f"{type(model).__name__} is not supported. Images come from models that emit one token a cell in raster order: "
        "Emu3, Janus, ImageGPT, LlamaGen, and GPT-2 or any *ForCausalLM of transformers whose grid you give; "
        "for another class, subclass RasterAdapter and call register_adapter(its class, the adapter)"
    )


def _takes_positions(model: Any) -> bool:
    """Whether attention is all that sees positions, and they are given: no ALiBi, no state from token to token."""
    given = "position_ids" in inspect.signature(model.forward).parameters
    return given and not getattr(model.config, "alibi", False) and not getattr(model, "_is_stateful", False)


def _prompt(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Token ids and mask ``[batch, tokens]``."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    return ids, torch.ones_like(ids) if mask is None else mask


def _pad_left(tensor: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (width - tensor.shape[1], 0))


def _only(values: Iterable[Any]) -> Any:
    """What all samples have in common."""
    found = set(values)
    if len(found) > 1:
        raise TersorError(f"samples of one batch have different grids {sorted(found, key=str)}; group them by grid")
    return found.pop()
