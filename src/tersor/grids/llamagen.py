"""A raster image transformer that runs LlamaGen's weights (arXiv 2406.06525), conditioned on a class or on text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from tersor._compat import with_cache
from tersor._errors import TersorError
from tersor.grids.blocks import PUBLISHED_HEADS, Block, Norm, Widths
from tersor.grids.conditions import CaptionEmbedding, ClassEmbedding, as_classes
from tersor.grids.decoding import AppendingReader, Ready, decode, ready_steps
from tersor.grids.original import is_state, load_strictly, read_weights
from tersor.grids.raster.requests import (
    check_criteria,
    check_guidance,
    check_mode,
    own_inputs,
    prepare,
    stop_if_late,
)
from tersor.grids.rotary import Rotation, kept_rotation
from tersor.grids.sampling import Generators, Sampler, additive, check_cfg_interval, check_generators, prefix_mask
from tersor.grids.schedule import RasterSchedule


class LlamaGenConfig(Widths, PreTrainedConfig):
    """Sizes of a `LlamaGen`; the defaults are LlamaGen-B for 24 by 24 tokens.

    Args:
        condition: ``"class"`` (one prefix token) or ``"text"`` (``condition_tokens`` features, padded on the left).
        condition_tokens: Prefix tokens: 1 for a class, 120 in the published text models.
        caption_size: Width of the text features.
        grid_size: Rows and columns in tokens.
        default_guidance: Guidance of generation, unless a call says otherwise.
        condition_dropout: Share of training samples that see the null condition, which guidance needs.

    Raises:
        ValueError: If sizes do not fit together.
    """

    model_type = "tersor_llamagen"

    vocab_size: int = 16384
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    condition: str = "class"
    condition_tokens: int = 1
    num_classes: int = 1000
    caption_size: int = 2048
    grid_size: tuple[int, ...] | list[int] = (24, 24)
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    default_guidance: float = 2.0
    condition_dropout: float = 0.1
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        key_heads = self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        if self.condition not in ("class", "text"):
            raise TersorError(f"condition={self.condition!r} must be 'class' or 'text'")
        if self.condition == "class" and self.condition_tokens != 1:
            raise TersorError(f"condition_tokens={self.condition_tokens} must be 1 for a class")
        if self.hidden_size % (4 * self.num_attention_heads) or self.num_attention_heads % key_heads:
            raise TersorError(
                f"hidden_size={self.hidden_size} must be a multiple of 4 times num_attention_heads="
                f"{self.num_attention_heads}, and that a multiple of num_key_value_heads={key_heads}"
            )
        self.grid_size = tuple(self.grid_size)
        super().__post_init__(**kwargs)


class LlamaGen(PreTrainedModel, GenerationMixin):
    """Llama blocks over image tokens in raster order, with rotary positions from row and column.

    Parameters are named as in LlamaGen's checkpoints; `convert_llamagen` reads those.
    """

    config_class = LlamaGenConfig
    base_model_prefix = "model"
    main_input_name = "class_labels"
    output_modalities = ("image",)
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__(config)
        embedding = ClassEmbedding if config.condition == "class" else CaptionEmbedding
        self.cls_embedding: Any = embedding(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer, causal=True) for layer in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CaptionEmbedding):
            module.init_null()

    def get_input_embeddings(self) -> nn.Module:
        return self.tok_embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def condition(
        self,
        class_labels: Tensor | None = None,
        text_features: Tensor | None = None,
        text_mask: Tensor | None = None,
        *,
        guided: bool = False,
        dropped: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The prefix: embeddings ``[rows, condition_tokens, width]`` and which of them are no padding (bool).

        Args:
            class_labels: ``[batch]``.
            text_features: ``[batch, tokens, caption_size]``, padded on the left; longer texts are cut.
            text_mask: ``[batch, tokens]``, 0 for padding; None is no padding. A text without tokens is the null one.
            guided: Append the null condition for each sample, as further rows.
            dropped: Bool ``[batch]``, samples that get the null condition instead of their own.

        Raises:
            ValueError: If the condition is of the other kind, a label is no class, or features have another shape.
        """
        config = self.config
        if config.condition == "class":
            if class_labels is None or text_features is not None or text_mask is not None:
                raise TersorError("this model is conditioned on a class: give class_labels [batch]")
            labels = as_classes(class_labels, config.num_classes).to(self.device)
            return self.cls_embedding.prefix(labels, guided=guided, dropped=dropped)
        if text_features is None or class_labels is not None:
            raise TersorError("this model is conditioned on text: give text_features [batch, tokens, width]")
        return self.cls_embedding.prefix(text_features, text_mask, guided=guided, dropped=dropped)

    @property
    def axes(self) -> tuple[int, ...]:
        """Sizes of the grid whose coordinates the rotary positions turn by."""
        return tuple(self.config.grid_size)

    def rotation(self, positions: Tensor) -> Rotation:
        """Factors of `turn` by position ``[batch, tokens]``.

        The first half of the pairs turns with the row, the second with the column. Prefix positions get zeros and not
        a rotation by zero: the weights were trained with queries and keys of the prefix being zero vectors.
        """
        config = self.config
        cosine, sine = kept_rotation(
            self.axes, config.head_dim, config.condition_tokens, config.rope_theta, positions.device
        )
        return cosine[positions], sine[positions]

    def forward(
        self,
        input_ids: Tensor | None = None,
        class_labels: Tensor | None = None,
        text_features: Tensor | None = None,
        text_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[batch, tokens, vocabulary]``, and a loss with ``labels``.

        Args:
            input_ids: Image ids ``[batch, tokens]`` in raster order. With a condition, its prefix goes before them.
            class_labels: See `condition`; in training, some samples lose theirs.
            text_features: See `condition`.
            text_mask: See `condition`.
            labels: Image ids ``[batch, cells]`` that the prefix and the tokens predict; -100 is left out.
            inputs_embeds: Embeddings instead of ids, with ``position_ids`` and an additive 4-D ``attention_mask``.
            attention_mask: See ``inputs_embeds``.
            position_ids: Places in the sequence ``[batch, tokens]``.
            cache: Tokens of earlier passes; it is appended to.
            past_key_values: The same, under its name before transformers 5.24.
            use_cache: Not used; a cache is used if it is given.
            logits_to_keep: How many of the last tokens have logits, 0 for all; or which tokens.
        """
        if inputs_embeds is None:
            inputs_embeds, attention_mask = self._embed(input_ids, class_labels, text_features, text_mask)
        batch, tokens, _ = inputs_embeds.shape
        cache = past_key_values if cache is None else cache
        seen = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(seen, seen + tokens, device=inputs_embeds.device).expand(batch, tokens)
        if attention_mask is None and seen and tokens > 1:
            raise TersorError(f"{tokens} tokens after {seen} cached ones need an additive 4-D attention_mask")
        rotation = self.rotation(position_ids)
        hidden = inputs_embeds
        for block in self.layers:
            hidden = block(hidden, rotation, attention_mask, cache)
        hidden = self.norm(hidden)
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.output(hidden[:, kept])
        loss = None
        if labels is not None:
            predicted = logits[:, self.config.condition_tokens - 1 :][:, : labels.shape[1]]
            loss = F.cross_entropy(predicted.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **with_cache(cache))

    def _embed(
        self, ids: Tensor | None, labels: Tensor | None, features: Tensor | None, text_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings of condition and image tokens, and a mask where the condition is padded."""
        image = [] if ids is None else [self.tok_embeddings(ids)]
        given = features if labels is None else labels
        if given is None:
            return torch.cat(image, dim=1), None
        dropped = None
        if self.training and self.config.condition_dropout > 0:
            dropped = torch.rand(len(given), device=given.device) < self.config.condition_dropout
        prefix, valid = self.condition(labels, features, text_mask, dropped=dropped)
        embeddings = torch.cat([prefix, *image], dim=1)
        if bool(valid.all()):
            return embeddings, None
        seen = prefix_mask(F.pad(valid, (0, embeddings.shape[1] - valid.shape[1]), value=True))
        return embeddings, additive(~seen, embeddings.dtype)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        class_labels: Tensor | None = None,
        text_features: Tensor | None = None,
        text_mask: Tensor | None = None,
        cfg_interval: int = -1,
        generator: Generators = None,
        **options: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Images in raster order, one token a pass. See `zipar_generate` and `speculative_generate` for fewer passes.

        Args:
            inputs: Short for ``class_labels``.
            class_labels: See `condition`.
            text_features: See `condition`.
            text_mask: See `condition`.
            cfg_interval: No guidance of cells that have more than so many before them; -1 guides all.
            generator: Where draws come from; None is the global state. A list has one for each image, so that an image
                does not depend on the others of its batch.
            **options: Options of the library's ``generate``, such as ``do_sample``, ``top_k``, ``guidance_scale`` or
                ``num_return_sequences``.

        Returns:
            Ids ``[batch, rows * columns]``, with ``return_dict_in_generate=True`` as the ``sequences`` of an output.

        Raises:
            ValueError: Before the first forward, if the request cannot be met; the message says what can.
            TimeoutError: When ``max_time`` is over.
        """
        config, criteria, processors, rest = prepare(self, options)
        check_mode(config)
        check_criteria(criteria)
        if config.output_scores:
            raise TersorError("output_scores is not available here; speculative_generate gives these images with them")
        scale = check_guidance(self.config.default_guidance if config.guidance_scale is None else config.guidance_scale)
        check_cfg_interval(cfg_interval, scale)
        named = {"class_labels": class_labels, "text_features": text_features, "text_mask": text_mask}
        if inputs is not None:
            named["class_labels"] = inputs
        given = own_inputs(self, named, rest, config.num_return_sequences or 1)
        prefix, valid = self.condition(**given, guided=scale is not None)
        images, sizes = len(prefix) // (1 if scale is None else 2), tuple(self.config.grid_size)
        check_generators(generator, images, self.device)
        sampler = Sampler(processors, bool(config.do_sample), generator)
        reader = RasterReader(
            self, prefix, valid, DynamicCache(), sampler, guidance=scale or 1.0, guided_cells=cfg_interval
        )
        ids = torch.zeros(images, math.prod(sizes), dtype=torch.long, device=self.device)
        decode(
            reader, ready_steps(RasterSchedule(sizes), self.device), ids, lambda so_far: stop_if_late(criteria, so_far)
        )
        return GenerateDecoderOnlyOutput(sequences=ids) if config.return_dict_in_generate else ids


class RasterReader(AppendingReader):
    """A `LlamaGen` whose tokens each give the next cell.

    Args:
        model: The model.
        prefix: See `AppendingReader`.
        valid: See `AppendingReader`.
        cache: See `AppendingReader`.
        sampler: See `AppendingReader`.
        **guiding: ``guidance`` and ``guided_cells``, see `AppendingReader`.
    """

    def __init__(
        self, model: LlamaGen, prefix: Tensor, valid: Tensor, cache: Any, sampler: Sampler, **guiding: Any
    ) -> None:
        super().__init__(prefix, valid, model.tok_embeddings, cache, sampler, **guiding)
        self.model = model

    def forward(self, ready: Ready, embeddings: Tensor, places: Tensor, seen: Tensor | None) -> Tensor:
        """See `AppendingReader`."""
        if seen is None:
            mask = embeddings.new_zeros(1, 1, len(places), self.cache.get_seq_length() + len(places))
        else:
            mask = additive(~seen, embeddings.dtype)
        out = LlamaGen.forward(
            self.model,
            inputs_embeds=embeddings,
            position_ids=places[None],
            attention_mask=mask,
            cache=self.cache,
            logits_to_keep=len(ready.step.cells),
        )
        return out.logits.float()

    def choose(self, ready: Ready, logits: Tensor, ids: Tensor) -> Tensor:
        """See `Reader`; guided as the library guides."""
        return super().choose(ready, logits if self.branches == 1 else logits.log_softmax(-1), ids)


def convert_llamagen(
    path: str | Path, *, grid_size: tuple[int, int], num_attention_heads: int | None = None
) -> LlamaGen:
    """A `LlamaGen` with the weights of an original ``.pt`` checkpoint; save it with ``save_pretrained``.

    Args:
        path: The file. It is read without executing anything from it, and mapped rather than loaded.
        grid_size: Rows and columns that the model was trained for: its resolution over 16.
        num_attention_heads: Needed for widths that were not published.

    Raises:
        ValueError: If the file holds no such weights; the message lists names or shapes.
    """
    read = read_weights(path, ("model", "module", "state_dict"))
    weights = {name: each for name, each in read.items() if not is_state(name)}
    config = _config_of(weights, grid_size, num_attention_heads)
    with torch.device("meta"):
        model = LlamaGen(config)
    load_strictly(model, weights, path, "LlamaGen checkpoint")
    return model.eval()


def _config_of(weights: dict[str, Tensor], grid_size: tuple[int, int], heads: int | None) -> LlamaGenConfig:
    """Sizes as the weights have them; raises `ValueError` where they do not tell."""
    tokens, wqkv = weights.get("tok_embeddings.weight"), weights.get("layers.0.attention.wqkv.weight")
    classes = weights.get("cls_embedding.embedding_table.weight")
    caption, null = weights.get("cls_embedding.cap_proj.fc1.weight"), weights.get("cls_embedding.uncond_embedding")
    text = caption is not None and null is not None and null.ndim == caption.ndim == 2
    sized = all(each is not None and each.ndim == 2 for each in (tokens, wqkv))
    if tokens is None or wqkv is None or not sized or not (text or (classes is not None and classes.ndim == 2)):
        raise TersorError(f"this is no LlamaGen checkpoint: it has {sorted(weights)[:8]} and so on")
    vocabulary, width = tokens.shape
    heads = heads or PUBLISHED_HEADS.get(width)
    if heads is None:
        raise TersorError(f"no published LlamaGen is {width} wide; give num_attention_heads")
    key_heads = (wqkv.shape[0] - width) * heads // (2 * width)
    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "grid_size": tuple(grid_size),
    }
    if text:
        assert null is not None
        sizes = {"condition_tokens": null.shape[0], "caption_size": null.shape[1], "default_guidance": 7.5}
        return LlamaGenConfig(**settings, condition="text", **sizes)
    assert classes is not None
    return LlamaGenConfig(**settings, num_classes=classes.shape[0] - 1)
