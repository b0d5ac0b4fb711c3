"""Better steps for codes that stay as they are: by gradient descent on logits, or in closed form, linear by linear.

With ``v = u - zero`` (zero in salient columns) the delta ``D^ = s v + D_S`` is linear in the steps ``s``. ME-Switch
says that its steps are learnable; the loss, mean squared error of logits against the uncompressed expert, and Adam
follow BitDelta (arXiv 2402.10193). The closed form is ours: it needs no gradients and one linear at a time.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor._errors import TersorError
from tersor.bench.runs import OnProgress
from tersor.experts.calibration import Batches, second_moments
from tersor.experts.delta import ExpertDelta
from tersor.experts.quantizer import FLOOR
from tersor.experts.sources import Source
from tersor.lowbit.kernels.delta_linear import PackedDelta
from tersor.lowbit.packing import unpack_half_split

#: Steps of training between two looks at the validation loss.
LOOK_EVERY = 10


def signs(delta: ExpertDelta, name: str) -> Tensor:
    """``v`` ``[out, in]`` float32 of one linear: codes less their zero, and zero in salient columns."""
    packed = delta.packed(name)
    v: Tensor = unpack_half_split(packed.codes, packed.bits, packed.dim).float() - packed.zero
    v[:, packed.salient_index.long()] = 0
    return v


def salient_columns(delta: ExpertDelta, name: str) -> Tensor:
    """``D_S`` ``[out, k]`` float32: what salient channels add, whatever part of it their codes stand for."""
    packed = delta.packed(name)
    kept: Tensor = packed.salient_weight.float()
    return kept + _coded(packed, packed.step)


def _coded(packed: PackedDelta, step: Tensor) -> Tensor:
    """What the code of a salient channel stands for, ``[out, 1]``: nothing, or half a step where no code is zero."""
    numbers: Tensor = step.float() * (2 ** (packed.bits - 1) - packed.zero)
    return numbers[:, None]


def with_steps(delta: ExpertDelta, steps: dict[str, Tensor]) -> ExpertDelta:
    """The same codes with other steps; salient channels still add what they added."""
    tensors = dict(delta.tensors)
    for name, step in steps.items():
        packed, kept = delta.packed(name), salient_columns(delta, name)
        stored = step.to(packed.step.dtype)
        tensors[f"{name}.step"] = stored
        if packed.zero != 2 ** (packed.bits - 1):
            tensors[f"{name}.salient_weight"] = (kept - _coded(packed, stored)).to(packed.salient_weight.dtype)
    return replace(delta, tensors=tensors)


def closed_form_step(delta: Tensor, v: Tensor, moment: Tensor, step: Tensor) -> Tensor:
    """The steps that minimise ``||X (D_j - s_j v_j)^T||^2`` row by row.

        s_j = (v_j C D_j^T) / (v_j C v_j^T),  C = X^T X

    Args:
        delta: ``[out, in]``, with zeros in salient columns.
        v: The codes less their zero point, as ``delta``.
        moment: ``C`` ``[in, in]``, all of it: with its diagonal alone the steps get worse, because a few energetic
            channels then decide them.
        step: ``[out]``, kept where the denominator is 0 or the result is not positive.
    """
    product = v @ moment
    above, below = (product * delta).sum(1), (product * v).sum(1)
    fitted = above / torch.where(below > 0, below, 1.0)
    return torch.where((below > 0) & (fitted > 0), fitted, step.float())


def distill_closed_form(delta: ExpertDelta, base: Source, expert: nn.Module, data: Batches) -> ExpertDelta:
    """Steps in closed form from the second moments of the expert's inputs on ``data``."""
    steps, theirs = {}, Source(expert, full_modules=delta.manifest.config.full_modules)
    for moments in second_moments(expert, list(delta.manifest.modules), data):
        for name, moment in moments.items():
            full = theirs.read(f"{name}.weight").float() - base.read(f"{name}.weight").float()
            full[:, delta.packed(name).salient_index.long()] = 0
            steps[name] = closed_form_step(full, signs(delta, name), moment, delta.packed(name).step)
    return with_steps(delta, steps)


class _StudentLinear(nn.Module):
    """The base's linear plus a delta whose step alone is trained."""

    weight: Tensor
    bias: Tensor | None
    v: Tensor

    def __init__(self, base: Tensor, bias: Tensor | None, delta: ExpertDelta, name: str) -> None:
        super().__init__()
        weight = base.detach().float().clone()
        weight[:, delta.packed(name).salient_index.long()] += salient_columns(delta, name)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("v", signs(delta, name))
        self.step = nn.Parameter(delta.packed(name).step.float().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(x, self.v) * self.step


def distill_codes(
    delta: ExpertDelta, base: Source, expert: nn.Module, data: Batches, *, on_progress: OnProgress
) -> ExpertDelta:
    """Train the steps on logits of the uncompressed expert; the best of the validation batches are kept.

    Settings are `DeltaConfig.distill_steps` and ``distill_rate``; the rate falls to 0 as a cosine.
    """
    config = delta.manifest.config
    teacher = copy.deepcopy(expert).float().eval().requires_grad_(False)
    student = copy.deepcopy(teacher)
    for name in delta.manifest.modules:
        bias: Any = student.get_submodule(name).bias
        student.set_submodule(name, _StudentLinear(base.read(f"{name}.weight"), bias, delta, name))
    trained = {name: student.get_parameter(f"{name}.step") for name in delta.manifest.modules}
    groups = [{"params": [p], "lr": config.distill_rate * float(p.detach().mean())} for p in trained.values()]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / config.distill_steps)) / 2
    )
    training, validation = _split(data)
    targets = [_logits(teacher, batch).detach() for batch in training]
    checks = [_logits(teacher, batch).detach() for batch in validation]

    def steps() -> dict[str, Tensor]:
        return {name: step.detach().clone() for name, step in trained.items()}

    best, before = steps(), _loss(student, validation, checks)
    least = before
    for number in range(config.distill_steps):
        place = number % len(training)
        loss = F.mse_loss(_logits(student, training[place]), targets[place])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for step in trained.values():
                step.clamp_(min=FLOOR)
        if (number + 1) % LOOK_EVERY == 0 or number + 1 == config.distill_steps:
            now = _loss(student, validation, checks)
            on_progress(
                f"distillation, step {number + 1} of {config.distill_steps}: loss {now:.3g}, before {before:.3g}"
            )
            if now < least:
                best, least = steps(), now
    return with_steps(delta, best)


def _split(data: Batches) -> tuple[Batches, Batches]:
    """Training and validation: a quarter of the batches, or of the rows where there are few."""
    if len(data) >= 4:
        return [b for i, b in enumerate(data) if i % 4 != 3], data[3::4]
    ids, mask = data[-1]
    if len(ids) < 2:
        raise TersorError("distillation needs at least two calibration sequences: one to train on, one to check with")
    cut = max(1, len(ids) // 4)
    return [*data[:-1], (ids[cut:], mask[cut:])], [(ids[:cut], mask[:cut])]


def _logits(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """``[tokens, vocabulary]`` of the tokens that are no padding."""
    ids, mask = batch
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[mask.bool()]


@torch.no_grad()
def _loss(student: nn.Module, data: Batches, targets: list[Tensor]) -> float:
    losses = [F.mse_loss(_logits(student, batch), target) for batch, target in zip(data, targets, strict=True)]
    return float(sum(losses) / len(losses))
