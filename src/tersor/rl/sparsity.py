"""The token ratio as a number with a gradient: what the reward of ZipR1 measures, made differentiable.

A rollout's ratio is fixed by its prompt, its threshold and the weights; no sampled answer changes it. In the gradient
of the expected reward ``E[r_per - rho]`` a score function therefore has nothing to say of ``rho``: what is left is the
derivative of ``rho`` itself. The count of Eq. (6) is a step function of the attention. Interpolated between two tokens
it has that derivative almost everywhere, and is off by less than one token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tersor._errors import TersorError

if TYPE_CHECKING:
    from tersor.kv.engine.state import LayerRecord
    from tersor.kv.session import Session

#: From accumulated attention ``[batch, tokens]`` and thresholds ``[batch]`` to a number of tokens ``[batch]``.
Count = Callable[[Tensor, Tensor], Tensor]


def soft_count(sums: Tensor, tau: Tensor) -> Tensor:
    """ZipVL's count (Eq. 6), interpolated linearly within the token that reaches the threshold.

    With ``s`` the attention in descending order and ``c`` its running sum: ``k`` tokens hold less than ``tau`` of it,
    and of the next one the part ``(tau * c[-1] - c[k - 1]) / s[k]`` is needed. Eq. (6) counts that one whole.

    Args:
        sums: Attention that each token got from the probed rows, at least 0, ``[batch, tokens]``.
        tau: Share to reach, ``[batch]``.

    Returns:
        Float64 ``[batch]``, at most the count of Eq. (6) and less than one below it.
    """
    largest = sums.double().sort(-1, descending=True).values
    reached = largest.cumsum(-1)
    goal = tau.to(reached)[:, None] * reached[:, -1:]
    whole = (reached < goal).sum(-1, keepdim=True).clamp(max=sums.shape[-1] - 1)
    before = nn.functional.pad(reached, (1, 0)).gather(-1, whole)
    part = (goal - before) / largest.gather(-1, whole).clamp_min(torch.finfo(reached.dtype).tiny)
    return (whole + part)[:, 0]


def effective_count(sums: Tensor, tau: Tensor) -> Tensor:
    """Tokens of an even distribution with the same entropy, ``exp(H(a))``: a proxy that knows no threshold.

    Args:
        sums: As in `soft_count`.
        tau: Not used.

    Returns:
        Float64 ``[batch]``.
    """
    share = sums.double() / sums.double().sum(-1, keepdim=True)
    # A token without any attention, such as padding, counts nothing; its logarithm's slope would be infinite.
    share = share.clamp_min(torch.finfo(share.dtype).tiny)
    return (-(share * share.log()).sum(-1)).exp()


def soft_token_ratio(session: Session, count: Count = soft_count) -> Tensor:
    """Token ratio of the rows of the latest prompt, mean over the decoder's layers, with a gradient.

    Rows and layers that were read densely count as 1, tokens that stay whatever their attention (`ZipVL.protect_recent`
    and its like) are not counted on top: at the defaults the last token, which is nearly always among the counted.

    Args:
        session: A session whose latest forward ran inside of `Session.thresholds` with ``differentiable=True``, or got
            such a ``thresholds=``.
        count: What is counted in each layer.

    Returns:
        Float64 ``[batch]``.

    Raises:
        ValueError: If the forward had no thresholds by row, its scores are not finite, or they lost their gradient,
            as reentrant gradient checkpointing makes them.
    """
    state = session.state
    if state is None or state.thresholds is None:
        raise TersorError("the latest forward had no thresholds by row; run it inside of session.thresholds(...)")
    tau = state.thresholds.tau
    layers = session.model.config.get_text_config(decoder=True).num_hidden_layers
    shares = [_share(record, tau, count, layer) for layer, record in state.records.items()]
    dense = torch.full_like(tau, layers - len(shares), device=shares[0].device)
    return (torch.stack(shares).sum(0) + dense) / layers


def _share(record: LayerRecord, tau: Tensor, count: Count, layer: int) -> Tensor:
    """Share of its prompt that each row needs in one layer, float64 ``[batch]``."""
    length = record.prompt.sum(-1)
    tau = tau.to(length.device)
    if record.scored is None or record.scored.scores.sums is None:
        return torch.ones_like(tau)
    sums = record.scored.scores.sums[:, 0]
    if not record.scored.finite:
        raise TersorError(f"layer {layer}: attention scores are not finite; look for overflow in the model's precision")
    if torch.is_grad_enabled() and not sums.requires_grad:
        raise TersorError(
            f"layer {layer}: the scores of this forward have no gradient; set differentiable=True, train the weights "
            "before them, and use gradient checkpointing that is not reentrant"
        )
    protected = record.scored.protected
    whole = tau >= 1.0 if protected is None else (tau >= 1.0) | (protected | ~record.prompt).all(-1)
    return torch.where(whole, 1.0, count(sums, tau) / length)
