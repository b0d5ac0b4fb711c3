"""NAR: images and videos from neighbour to neighbour, one front of the grid a pass (arXiv 2503.10696)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from tersor._errors import TersorError
from tersor.grids.blocks import Norm, unscaled_norm
from tersor.grids.conditions import as_classes
from tersor.grids.decoding import ready_steps
from tersor.grids.llamagen import LlamaGen
from tersor.grids.nar.decoding import NAROutput, NARReader, Sampling, decode_fronts, resolve_grid
from tersor.grids.nar.model import NARConfig, NARModel, NARPreTrainedModel, Output
from tersor.grids.sampling import Generators, check_generators
from tersor.grids.schedule import NARSchedule

__all__ = ["NARConfig", "NARForImageGeneration", "NARImageOutput", "NARModel", "NAROutput", "mixing_plan", "visibility"]

#: Logits that the training loss holds at once; the rest is computed again in the backward pass.
_LOGITS_AT_ONCE = 2**27
_IGNORED = -100


@dataclass
class NARImageOutput(ModelOutput):
    """What a forward gives.

    Args:
        loss: Cross-entropy, with labels.
        logits: Mixed, float32 ``[batch, cells, vocabulary]``; None in training with labels, where nobody needs them.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class MixingPlan:
    """Which hidden states give each cell's logits.

    Args:
        sources: ``[heads, cells]``, where each head predicts the cell from: 0 is the prefix's last token, 1 the first
            cell. The first cell has the prefix for all heads; where a head has no cell to predict from, it is 0 too.
        weights: Float32 ``[heads, cells]``, each column adds up to 1.
    """

    sources: Tensor
    weights: Tensor

    def at(self, cells: Tensor) -> MixingPlan:
        """The plan of some cells, ``[n]``."""
        return MixingPlan(self.sources[:, cells], self.weights[:, cells])


def mixing_plan(sizes: tuple[int, ...], mixing: str = "mean", device: torch.device | None = None) -> MixingPlan:
    """The plan of a whole grid in raster order; heads go from the last axis to the first."""
    cells = torch.arange(math.prod(sizes), device=device)
    sources, stride = [], 1
    for size in reversed(sizes):
        sources.append(torch.where(cells // stride % size > 0, cells - stride + 1, 0))
        stride *= size
    found = torch.stack(sources)
    taken = (found > 0) | (cells == 0)
    if mixing != "mean":
        head = ("right", "below", "later").index(mixing)
        alone = taken[head] & (cells > 0)
        others = torch.arange(len(sizes), device=device) != head
        taken = taken & ~(others[:, None] & alone)
    return MixingPlan(found, taken / taken.sum(0, keepdim=True))


@functools.lru_cache(maxsize=16)
def front_plans(
    sizes: tuple[int, ...], mixing: str = "mean", device: torch.device | None = None
) -> tuple[tuple[Tensor, MixingPlan], ...]:
    """Of each pass, the raster indices ``[n]`` of the cells that it decides, and how their logits are mixed.

    The plans' sources count within the front before, whose hidden states are what a pass has.
    """
    with torch.inference_mode(False):
        plan, slots = mixing_plan(sizes, mixing, device), torch.zeros(1 + math.prod(sizes), dtype=torch.long)
        slots, found = slots.to(device), []
        for ready in ready_steps(NARSchedule(sizes), slots.device):
            front = ready.targets
            part = plan.at(front)
            # Where a head does not take part its source is not in the front before; any will do.
            sources = slots[part.sources] * (part.weights > 0)
            found.append((front, MixingPlan(sources, part.weights)))
            slots[front + 1] = torch.arange(len(front), device=device)
        return tuple(found)


def visibility(sizes: tuple[int, ...], prefix: int, device: torch.device | None = None) -> Tensor:
    """The paper's proximity-aware mask, bool ``[prefix + cells, prefix + cells]``: who sees whom.

    The prefix is causal and sees no cell; a cell sees the prefix and every cell that is no farther from the first one.
    """
    cells, stride = torch.arange(math.prod(sizes), device=device), 1
    distance = torch.zeros_like(cells)
    for size in reversed(sizes):
        distance = distance + cells // stride % size
        stride *= size
    # A prefix token sees what is before it, which is what a distance below all cells and a causal mask say.
    front = F.pad(distance, (prefix, 0), value=-1)
    causal = torch.arange(prefix + len(cells), device=device)
    return (front <= front[:, None]) & ((front >= 0) | (front[:, None] >= 0) | (causal <= causal[:, None]))


def flipped(grids: Tensor, axes: tuple[int, ...] | list[int]) -> Tensor:
    """Grids ``[batch, *sizes, ...]`` with some of their axes from end to start."""
    return grids.flip([1 + axis for axis in axes]) if axes else grids


class NARForImageGeneration(NARPreTrainedModel):
    """A `NARModel` with a norm and an output matrix for each axis, whose logits are mixed."""

    output_modalities = ("image",)

    def __init__(self, config: NARConfig) -> None:
        super().__init__(config)
        self.model = NARModel(config)
        heads = range(len(config.exits))
        self.norms = nn.ModuleList(Norm(config.hidden_size, config.rms_norm_eps) for _ in heads)
        self.outputs = nn.ModuleList(Output(config.hidden_size, config.vocab_size, bias=False) for _ in heads)
        self.post_init()

    @classmethod
    def from_raster(cls, raster: LlamaGen, **changes: Any) -> NARForImageGeneration:
        """An initialisation for training from a raster model, not a model that is ready to generate.

        The backbone and the right-hand head are the raster model's; the further block is a copy of its last one, the
        head below a copy of the right-hand one.

        Args:
            raster: What to start from.
            **changes: Changes of the configuration, such as dropouts.
        """
        theirs, weights = raster.config, raster.state_dict()
        names = (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "condition",
            "condition_tokens", "num_classes", "caption_size", "grid_size", "rms_norm_eps", "rope_theta",
            "condition_dropout",
        )  # fmt: skip
        model = cls(NARConfig(**{**{name: getattr(theirs, name) for name in names}, **changes}))
        last = f"layers.{theirs.num_hidden_layers - 1}."
        extra = range(theirs.num_hidden_layers, model.config.exits[-1])
        copied = {
            f"model.{name}": each for name, each in weights.items() if name not in ("norm.weight", "output.weight")
        }
        for name, each in weights.items():
            if name.startswith(last):
                copied |= {f"model.layers.{layer}.{name.removeprefix(last)}": each for layer in extra}
        for head in range(len(model.outputs)):
            copied |= {f"norms.{head}.weight": weights["norm.weight"]}
            copied |= {f"outputs.{head}.weight": weights["output.weight"]}
        model.load_state_dict({name: each.clone() for name, each in copied.items()})
        return model.to(raster.dtype).eval()

    def get_output_embeddings(self) -> None:
        """There is one output matrix a head, none of which is tied."""
        return None

    def mixed_logits(self, states: tuple[Tensor, ...], plan: MixingPlan) -> Tensor:
        """Logits of cells, float32 ``[batch, cells, vocabulary]``: the weighted heads at each cell's neighbours.

        Args:
            states: Hidden states of each head, ``[batch, tokens, width]``; the plan's sources point into their tokens.
        """
        heads = [min(number, len(self.outputs) - 1) for number in range(len(plan.sources))]
        neighbours = [states[head].index_select(1, source) for head, source in zip(heads, plan.sources, strict=True)]
        # The heads' norms differ in scale alone. Half precision would overflow in the sum.
        normed = unscaled_norm(torch.stack(neighbours), self.config.rms_norm_eps)
        parts = (
            weight[:, None] * self.head_logits(head, state).float()
            for head, state, weight in zip(heads, normed, plan.weights, strict=True)
        )
        return functools.reduce(torch.add, parts)

    def head_logits(self, head: int, normed: Tensor) -> Tensor:
        """One head's logits of the cells next to those that ``normed``, states after `unscaled_norm`, stand for."""
        norm = self.norms[head]
        assert isinstance(norm, Norm)
        logits: Tensor = self.outputs[head](normed * norm.weight)
        return logits

    def forward(
        self,
        input_ids: Tensor,
        class_labels: Tensor | None = None,
        text_features: Tensor | None = None,
        text_mask: Tensor | None = None,
        labels: Tensor | None = None,
        grid_size: tuple[int, ...] | None = None,
    ) -> NARImageOutput:
        """Mixed logits of every cell, and a loss with ``labels``.

        Args:
            input_ids: All cells' ids, ``[batch, cells]`` in raster order or ``[batch, *grid]``.
            class_labels: See `NARModel.condition`; in training, some samples lose theirs.
            text_features: See `NARModel.condition`.
            text_mask: See `NARModel.condition`.
            labels: Ids to predict, shaped like ``input_ids`` and mostly the same; -100 is left out.
            grid_size: Another grid than the model's; only rotary positions have one.

        Raises:
            ValueError: If ids are outside the vocabulary, or of another grid.
        """
        config = self.config
        sizes = resolve_grid(config, grid_size)
        ids = self._checked(input_ids, sizes, "input_ids")
        dropped = None
        if self.training and config.has_null:
            dropped = torch.rand(len(ids), device=ids.device) < config.condition_dropout
        prefix, valid = self.model.condition(class_labels, text_features, text_mask, batch=len(ids), dropped=dropped)
        if len(prefix) != len(ids):
            raise TersorError(f"there are {len(prefix)} conditions for {len(ids)} samples; give one each")
        embeddings = torch.cat([prefix, self.model.tok_embeddings(ids)], dim=1)
        places = torch.arange(embeddings.shape[1], device=ids.device)
        mask = self._mask(sizes, valid)
        states = self.model(embeddings, places, sizes, mask)
        states = tuple(state[:, config.condition_tokens - 1 :] for state in states)
        plan = mixing_plan(sizes, config.mixing, ids.device)
        loss = None if labels is None else self._loss(states, plan, self._checked(labels, sizes, "labels"))
        if self.training and labels is not None:
            return NARImageOutput(loss=loss)
        logits = flipped(self.mixed_logits(states, plan).unflatten(1, sizes), config.flipped_axes)
        return NARImageOutput(loss, logits.flatten(1, -2))

    def _checked(self, ids: Tensor, sizes: tuple[int, ...], name: str) -> Tensor:
        """Ids ``[batch, cells]`` as the fronts count the cells, which starts in the corner of ``flipped_axes``."""
        cells, most = math.prod(sizes), self.config.vocab_size - 1
        if ids.is_floating_point() or ids.ndim < 2 or tuple(ids.shape[1:]) not in ((cells,), sizes):
            raise TersorError(
                f"{name} must be whole numbers [batch, {cells}] or [batch, {sizes}]; got {tuple(ids.shape)}"
            )
        allowed = (ids >= 0) & (ids <= most) | ((ids == _IGNORED) & (name == "labels"))
        # Not checked under torch.compile: a data-dependent branch breaks the graph.
        if not torch.compiler.is_compiling() and not bool(allowed.all()):
            raise TersorError(f"{name} must be from 0 to {most}; got {int(ids.min())} to {int(ids.max())}")
        return flipped(ids.reshape(-1, *sizes), self.config.flipped_axes).flatten(1)

    def _mask(self, sizes: tuple[int, ...], valid: Tensor) -> Tensor:
        """`visibility` without the prefix's padding, bool ``[batch or 1, 1, tokens, tokens]``."""
        square = visibility(sizes, valid.shape[1], valid.device)
        if self.config.condition != "text":
            return square[None, None]
        seen = F.pad(valid, (0, math.prod(sizes)), value=True)
        # Padding sees itself: a row that sees nothing would give NaN.
        own = torch.eye(len(square), dtype=torch.bool, device=valid.device)
        return (square & seen[:, None] | own)[:, None]

    def _loss(self, states: tuple[Tensor, ...], plan: MixingPlan, labels: Tensor) -> Tensor:
        """Cross-entropy of the mixed logits, and if wanted of each head alone on the cells that it predicts."""
        loss = self._cross_entropy(states, plan, labels)
        if self.config.aux_head_loss_weight == 0:
            return loss
        for head, source in enumerate(plan.sources):
            cells = (source > 0).nonzero().squeeze(-1)
            if len(cells):
                alone = torch.zeros_like(plan.weights)
                alone[head] = 1.0
                own = self._cross_entropy(states, MixingPlan(plan.sources, alone).at(cells), labels[:, cells])
                loss = loss + self.config.aux_head_loss_weight * own
        return loss

    def _cross_entropy(self, states: tuple[Tensor, ...], plan: MixingPlan, labels: Tensor) -> Tensor:
        """Mean over the cells; a few of them at once, so that the logits of a large vocabulary fit into memory."""
        cells = torch.arange(labels.shape[1], device=labels.device)
        parts = cells.split(max(1, _LOGITS_AT_ONCE // (len(labels) * self.config.vocab_size)))

        def summed(part: Tensor, *states: Tensor) -> Tensor:
            logits = self.mixed_logits(states, plan.at(part))
            return F.cross_entropy(
                logits.flatten(0, 1), labels[:, part].flatten(), ignore_index=_IGNORED, reduction="sum"
            )

        if len(parts) == 1:
            total = summed(cells, *states)
        else:
            total = torch.stack([checkpoint(summed, part, *states, use_reentrant=False) for part in parts]).sum()
        return total / (labels != _IGNORED).sum().clamp_min(1)

    @torch.no_grad()
    def generate(
        self,
        class_labels: Tensor | Sequence[int] | None = None,
        text_features: Tensor | None = None,
        text_mask: Tensor | None = None,
        *,
        guidance_scale: float | None = None,
        cfg_interval: int = -1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: Generators = None,
        num_return_sequences: int = 1,
        grid_size: tuple[int, ...] | None = None,
        output_logits: bool = False,
        return_dict_in_generate: bool = False,
    ) -> Tensor | NAROutput:
        """Images or videos, one front of the grid a pass: ids ``[samples, *grid]``.

        Args:
            class_labels: See `NARModel.condition`.
            text_features: See `NARModel.condition`.
            text_mask: See `NARModel.condition`.
            guidance_scale: The g of u + g (c - u), from 1, which is none; the configuration's if left out.
            cfg_interval: No guidance after so many tokens; -1 is always.
            temperature: 0 takes the most likely token.
            top_k: Draw among so many tokens; 0 is all.
            top_p: Draw among the tokens that have so much of the probability; 1 is all.
            generator: Where draws come from; None is the global state, as the library's ``generate`` does. A list has
                one for each sample, so that a sample does not depend on the others of its batch.
            num_return_sequences: Samples of each condition, one after the other.
            grid_size: Another grid than the model's; only rotary positions have one.
            output_logits: Keep the mixed logits, before guidance.
            return_dict_in_generate: Return a `NAROutput`.

        Raises:
            ValueError: Before the first forward, if the request cannot be met; the message says what can.

        Example:
            >>> import torch
            >>> from tersor.grids.nar.heads import NARConfig, NARForImageGeneration
            >>> shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "grid_size": (8, 8)}
            >>> model = NARForImageGeneration(NARConfig(vocab_size=64, **shape)).eval()
            >>> out = model.generate(torch.tensor([3, 7]), return_dict_in_generate=True)
            >>> out.sequences.shape, out.forward_passes
            (torch.Size([2, 8, 8]), 15)
        """
        config = self.config
        sizes = resolve_grid(config, grid_size, warn=True)
        sampling = Sampling(
            guidance_scale=config.default_guidance if guidance_scale is None else guidance_scale,
            cfg_interval=cfg_interval,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        sampling.check(self)
        if not isinstance(num_return_sequences, int) or num_return_sequences < 1:
            raise TersorError(f"num_return_sequences={num_return_sequences!r} must be at least 1")
        if class_labels is not None and config.condition == "class":
            class_labels = as_classes(class_labels, config.num_classes)
        given = [
            None
            if each is None
            else torch.as_tensor(each).to(self.device).repeat_interleave(num_return_sequences, dim=0)
            for each in (class_labels, text_features, text_mask)
        ]
        prefix, valid = self.model.condition(*given, batch=num_return_sequences, guided=sampling.guided)
        check_generators(generator, len(prefix) // (2 if sampling.guided else 1), self.device)
        plans = [plan for _, plan in front_plans(sizes, config.mixing, self.device)]
        out = decode_fronts(
            NARReader(self, prefix, valid, sizes, plans, sampling, generator, output_logits=output_logits)
        )
        out.sequences = flipped(out.sequences, config.flipped_axes)
        out.logits = None if out.logits is None else flipped(out.logits, config.flipped_axes)
        return out if return_dict_in_generate else out.sequences
