"""NAR's transformer (arXiv 2503.10696): a backbone over the cells of a grid, with one exit for each axis."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from tersor._errors import TersorError
from tersor.grids.blocks import Block, Widths
from tersor.grids.cache import FrontCache
from tersor.grids.conditions import CaptionEmbedding, ClassEmbedding, as_classes
from tersor.grids.geometry import check_sizes
from tersor.grids.rotary import Rotation, kept_rotation, rotation_of

#: The models of the paper; ``head_layers`` add one block, or two for videos.
PRESETS: dict[str, dict[str, Any]] = {
    "B": {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768},
    "M": {"num_hidden_layers": 18, "num_attention_heads": 16, "hidden_size": 1024},
    "L": {"num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 1024},
    "XL": {"num_hidden_layers": 36, "num_attention_heads": 20, "hidden_size": 1280},
    "XXL": {"num_hidden_layers": 48, "num_attention_heads": 24, "hidden_size": 1536},
    "video-L": {"num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 1024},
    "video-LP": {"num_hidden_layers": 30, "num_attention_heads": 20, "hidden_size": 1280},
}
_VIDEO = {"grid_size": (4, 16, 16), "vocab_size": 8192, "num_classes": 101, "position_type": "learned"}
_CHOICES = {
    "condition": ("class", "text", "none"),
    "position_type": ("rope", "learned", "sincos"),
    "mixing": ("mean", "right", "below", "later"),
}


class NARConfig(Widths, PreTrainedConfig):
    """Sizes of a NAR model; the defaults are NAR-B for 16 by 16 tokens. `preset` gives the published ones.

    Args:
        grid_size: ``(rows, columns)`` of an image, or ``(frames, rows, columns)`` of a video, in tokens.
        num_hidden_layers: Blocks of the backbone, L; ``head_layers`` come on top.
        head_layers: Further blocks of each head, from the one of the last axis on, each on top of those before it;
            the default is none for the first and one for the others. A single entry is a model with one head for all
            axes, the paper's ablation.
        flipped_axes: Axes of the grid along which generation goes from the last cell to the first: ``(1,)`` starts an
            image in its top right corner, ``(2,)`` a video. The fronts from that corner cross what those from the top
            left run along, such as strokes that lean to the right, and cells of a front are drawn without each other.
        position_type: ``"rope"`` turns by the coordinates, ``"learned"`` and ``"sincos"`` add a vector by the place in
            the sequence.
        condition: ``"class"`` and ``"none"`` (one prefix token), or ``"text"`` (``condition_tokens`` features).
        caption_size: Width of the text features.
        mixing: ``"mean"`` of the heads that see a cell (the paper), or for ablations one head where it sees the cell:
            ``"right"``, ``"below"`` or, of videos, ``"later"``.
        token_dropout: Dropout of tokens in training.
        residual_dropout: Dropout of attention's output in training.
        ffn_dropout: Dropout of the feed-forward's output in training.
        condition_dropout: Share of training samples that see the null condition, which guidance needs.
        aux_head_loss_weight: Weight of each head's own cross-entropy, added to that of the mixed logits.
        default_guidance: Guidance of generation; left out it is 7.5 for text, 2 for images and 1.25 for videos of a
            class, and 1, none, where there is no null condition.

    Raises:
        ValueError: If sizes do not fit together.
    """

    model_type = "tersor_nar"

    vocab_size: int = 16384
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_layers: tuple[int, ...] | list[int] | None = None
    grid_size: tuple[int, ...] | list[int] = (16, 16)
    flipped_axes: tuple[int, ...] | list[int] = ()
    position_type: str = "rope"
    rope_theta: float = 10000.0
    condition: str = "class"
    condition_tokens: int = 1
    num_classes: int = 1000
    caption_size: int = 2048
    mixing: str = "mean"
    token_dropout: float = 0.1
    residual_dropout: float = 0.1
    ffn_dropout: float = 0.1
    condition_dropout: float = 0.1
    aux_head_loss_weight: float = 0.0
    default_guidance: float | None = None
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.grid_size = tuple(self.grid_size)
        check_sizes(self.grid_size)
        if len(self.grid_size) not in (2, 3):
            raise TersorError(f"grid_size={self.grid_size} must be (rows, columns) or (frames, rows, columns)")
        self.flipped_axes = tuple(sorted(set(self.flipped_axes)))
        if not set(self.flipped_axes) <= set(range(len(self.grid_size))):
            raise TersorError(f"flipped_axes={self.flipped_axes} must be among {tuple(range(len(self.grid_size)))}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise TersorError(f"{name}={getattr(self, name)!r} must be one of {allowed}")
        if self.mixing == "later" and len(self.grid_size) == 2:
            raise TersorError("mixing='later' is for videos; an image has 'mean', 'right' and 'below'")
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self._check_heads()
        if self.condition != "text" and self.condition_tokens != 1:
            raise TersorError(f"condition_tokens={self.condition_tokens} must be 1 for condition={self.condition!r}")
        for name in ("token_dropout", "residual_dropout", "ffn_dropout", "condition_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise TersorError(f"{name}={getattr(self, name)} must be from 0 to below 1")
        if not self.aux_head_loss_weight >= 0:
            raise TersorError(f"aux_head_loss_weight={self.aux_head_loss_weight} must not be negative")
        if self.condition == "none":
            # What is the null class elsewhere is the one start token here.
            self.num_classes, self.condition_dropout = 0, 0.0
        if self.default_guidance is None:
            by_class = 2.0 if len(self.grid_size) == 2 else 1.25
            self.default_guidance = (7.5 if self.condition == "text" else by_class) if self.has_null else 1.0
        super().__post_init__(**kwargs)

    def _check_heads(self) -> None:
        axes = len(self.grid_size)
        self.head_layers = (0, *[1] * (axes - 1)) if self.head_layers is None else tuple(self.head_layers)
        if len(self.head_layers) not in (1, axes) or any(each < 0 for each in self.head_layers):
            raise TersorError(f"head_layers={self.head_layers} must have {axes} numbers, one an axis, or a single one")
        heads, key_heads = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        step = 2 * axes if axes == 2 and self.position_type == "rope" else 2
        if self.hidden_size % (step * heads) or heads % key_heads:
            raise TersorError(
                f"hidden_size={self.hidden_size} must be a multiple of {step} times num_attention_heads={heads}, and "
                f"that a multiple of num_key_value_heads={key_heads}"
            )
        if self.position_type == "rope" and self.head_dim < 2 * axes:
            raise TersorError(f"heads of {self.head_dim} channels are too small to turn by {axes} axes")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> NARConfig:
        """A published size by its name in `PRESETS`, with changes; `ValueError` for another name."""
        if name not in PRESETS:
            raise TersorError(f"there is no NAR-{name}; the published sizes are {[*PRESETS]}")
        return cls(**{**PRESETS[name], **(_VIDEO if name.startswith("video") else {}), **changes})

    @property
    def has_null(self) -> bool:
        """Whether there is a null condition that training has seen."""
        return self.condition_dropout > 0

    @property
    def exits(self) -> list[int]:
        """How many blocks lie below each head."""
        return [self.num_hidden_layers + each for each in accumulate(self.head_layers or ())]


class Output(nn.Linear):
    """From a head's hidden state to logits; zero at first."""


class NARPreTrainedModel(PreTrainedModel):
    """What NAR's classes share: configuration and initialisation."""

    config_class = NARConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Output):
            nn.init.zeros_(module.weight)
        elif isinstance(module, CaptionEmbedding):
            module.init_null()
        elif isinstance(module, NARModel) and module.positions is not None:
            nn.init.normal_(module.positions, std=self.config.initializer_range)


class NARModel(NARPreTrainedModel):
    """Embeddings and blocks: from a prefix and the tokens of cells to a hidden state for each head.

    The blocks of the paper's dimension-oriented heads form a cascade: the first head leaves after the backbone's last
    block, each further one after ``head_layers`` more.
    """

    def __init__(self, config: NARConfig) -> None:
        super().__init__(config)
        embedding = CaptionEmbedding if config.condition == "text" else ClassEmbedding
        self.cls_embedding: Any = embedding(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_dropout = nn.Dropout(config.token_dropout)
        self.exits = config.exits
        self.layers = nn.ModuleList(Block(config, layer, causal=False) for layer in range(self.exits[-1]))
        self.positions = None
        if config.position_type == "learned":
            length = config.condition_tokens + math.prod(config.grid_size)
            self.positions = nn.Parameter(torch.empty(length, config.hidden_size))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tok_embeddings

    def condition(
        self,
        class_labels: Tensor | None = None,
        text_features: Tensor | None = None,
        text_mask: Tensor | None = None,
        *,
        batch: int = 1,
        guided: bool = False,
        dropped: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The prefix: embeddings ``[rows, condition_tokens, width]`` and which of them are no padding (bool).

        Args:
            class_labels: ``[batch]``.
            text_features: ``[batch, tokens, caption_size]``, padded on the left.
            text_mask: ``[batch, tokens]``, 0 for padding; None is no padding. A text without tokens is the null one.
            batch: Samples, for a model without condition.
            guided: Append the null condition for each sample, as further rows.
            dropped: Bool ``[batch]``, samples that get the null condition instead of their own.

        Raises:
            ValueError: If the condition is of the other kind, a label is no class, or features have another shape.
        """
        config = self.config
        given = (class_labels is not None, text_features is not None)
        expected = {"class": (True, False), "text": (False, True), "none": (False, False)}[config.condition]
        if given != expected:
            what = {"class": "give class_labels [batch]", "text": "give text_features", "none": "give neither"}
            raise TersorError(f"this model's condition is {config.condition!r}: {what[config.condition]}")
        if text_features is not None:
            return self.cls_embedding.prefix(text_features, text_mask, guided=guided, dropped=dropped)
        if text_mask is not None:
            raise TersorError("text_mask goes with text_features; this model reads no text")
        if class_labels is None:
            labels = torch.zeros(batch, dtype=torch.long, device=self.device)
        else:
            labels = as_classes(class_labels, config.num_classes).to(self.tok_embeddings.weight.device)
        return self.cls_embedding.prefix(labels, guided=guided, dropped=dropped)

    def forward(
        self,
        inputs_embeds: Tensor,
        places: Tensor,
        grid_size: tuple[int, ...] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | FrontCache | None = None,
    ) -> tuple[Tensor, ...]:
        """Hidden states ``[batch, tokens, width]`` of each head, before its norm; the last axis's head comes first.

        Args:
            inputs_embeds: ``[batch, tokens, width]``.
            places: ``[tokens]`` in the sequence, which is the prefix and then the cells in raster order.
            grid_size: The model's own if left out.
            attention_mask: Bool ``[batch or 1, 1, tokens, keys]``, True where a token sees a key; None is everywhere.
            past_key_values: Tokens of earlier passes; it is appended to.
        """
        config, hidden = self.config, self.token_dropout(inputs_embeds) if self.training else inputs_embeds
        rotation = None
        if config.position_type == "rope":
            cosine, sine = self.rotation(tuple(grid_size or config.grid_size))
            rotation = cosine[places], sine[places]
        elif self.positions is not None:
            hidden = hidden + self.positions[places]
        else:
            hidden = hidden + sincos(places, config.hidden_size).to(hidden.dtype)
        states: list[Tensor] = []
        for below, block in enumerate(self.layers, start=1):
            hidden = block(hidden, rotation, attention_mask, past_key_values)
            states += [hidden] * self.exits.count(below)
        return tuple(states)

    def rotation(self, grid_size: tuple[int, ...]) -> Rotation:
        """Of every place in the sequence, as `turn` takes it: each axis turns its share of the pairs of channels.

        The prefix gets zeros and not a rotation by zero, as in LlamaGen: its queries and keys are zero vectors.
        """
        config = self.config
        # A compiled graph has its constants folded, and a cache within it would split it.
        build = rotation_of if torch.compiler.is_compiling() else kept_rotation
        # The model's own `device` goes through all of its parameters.
        device = self.tok_embeddings.weight.device
        return build(grid_size, config.head_dim, config.condition_tokens, config.rope_theta, device)


def sincos(places: Tensor, width: int) -> Tensor:
    """Fixed position vectors ``[tokens, width]``: sines of falling frequency, then cosines."""
    powers = torch.arange(width // 2, device=places.device, dtype=torch.float32) / (width / 2)
    angles = places.float()[:, None] * 10000.0**-powers
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
