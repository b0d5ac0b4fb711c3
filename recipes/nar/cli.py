"""What the recipes of the NAR models share: the ablation with one head, and their command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from shared.run import command_line, parse_and_prepare
from torch import Tensor
from transformers.utils import logging

from tersor.grids.nar.heads import MixingPlan, NARForImageGeneration


def with_losses_apart(model: NARForImageGeneration) -> NARForImageGeneration:
    """``model`` so that each of its predictions of a cell is a target of its own in training, as the ablation wants.

    One head for the neighbours along all axes has to predict different tokens from one state. With the loss of the
    mixed logits it could say little there and leave it to the mixture to add up, and would be half of a second head.
    """
    of_mixed = model._loss

    def loss(states: tuple[Tensor, ...], plan: MixingPlan, labels: Tensor) -> Tensor:
        if not model.training:
            return of_mixed(states, plan, labels)
        total = torch.zeros(())
        for number, (source, weight) in enumerate(zip(plan.sources, plan.weights, strict=True)):
            head = min(number, len(model.outputs) - 1)
            logits = model.outputs[head](model.norms[head](states[head].index_select(1, source))).float()
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            total = total + (weight * losses.view_as(labels)).mean()
        return total

    model._loss = loss  # type: ignore[method-assign]  # of this one alone, so that it is saved as what it is
    return model


def arguments(name: str, argv: list[str] | None, *, kinds: Sequence[str] = ()) -> argparse.Namespace:
    """The command line of the recipe of ``name``, whose ``--kind`` is one of ``kinds`` if there are any."""
    compared = ", or what it is compared with" if kinds else ""
    parser = command_line(f"{name}{compared}", seeded=False)
    parser.add_argument("--data", default="mnist", help="folder with mnist_png.zip, 'mnist' to fetch, or 'procedural'")
    if kinds:
        parser.add_argument("--kind", choices=kinds, default="nar")
    args = parse_and_prepare(parser, argv)
    logging.disable_progress_bar()
    return args
