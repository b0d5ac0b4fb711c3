"""What the inputs of an expert's linears look like on text of its own: energies, or full second moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

#: Bytes of second moments that are collected in one pass over the data.
MOMENT_BYTES = 2**31

Batches = Sequence[tuple[Tensor, Tensor]]


def input_energy(model: nn.Module, linears: Iterable[str], data: Batches) -> tuple[dict[str, Tensor], int]:
    """``sum_t x_ti^2`` over the tokens that are no padding, for each linear.

    Args:
        model: The uncompressed expert.
        linears: Names of modules.
        data: Ids and attention masks, ``[rows, tokens]`` each.

    Returns:
        float64 ``[in]`` by name (linears that read one tensor share one), and the number of tokens.
    """
    sums = _collect(model, list(linears), data, lambda x: x.double().square().sum(0))
    return sums, sum(int(mask.sum()) for _, mask in data)


def second_moments(model: nn.Module, linears: Sequence[str], data: Batches) -> Iterable[dict[str, Tensor]]:
    """``sum_t x_t x_t^T`` ``[in, in]`` float32 by name, for as many linears at a time as fit `MOMENT_BYTES`."""
    group: list[str] = []
    held = 0
    for name in linears:
        needed = 4 * model.get_parameter(f"{name}.weight").shape[1] ** 2
        if group and held + needed > MOMENT_BYTES:
            yield _collect(model, group, data, lambda x: x.float().T @ x.float())
            group, held = [], 0
        group.append(name)
        held += needed
    if group:
        yield _collect(model, group, data, lambda x: x.float().T @ x.float())


@torch.no_grad()
def _collect(
    model: nn.Module, linears: list[str], data: Batches, statistic: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Add up ``statistic`` of the tokens ``[tokens, in]`` that each linear reads."""
    sums: dict[str, Tensor] = {}
    mask = torch.empty(0)
    last: tuple[Any, Tensor] | None = None

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal last
            x = inputs[0]
            if last is None or last[0] is not x:  # q, k and v read one tensor, gate and up another
                tokens, kept = x.reshape(-1, x.shape[-1]), mask.bool().flatten().to(x.device)
                # Of a linear that only some tokens come to, it is not known which of them are padding.
                last = (x, statistic(tokens[kept] if len(tokens) == len(kept) else tokens))
            sums[name] = sums[name] + last[1] if name in sums else last[1]

        return look

    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    with ExitStack() as hooks:
        for name in linears:
            handle = model.get_submodule(name).register_forward_pre_hook(hook(name))
            hooks.callback(handle.remove)
        for ids, mask in data:
            last = None
            model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    model.train(was_training)
    return {name: total.cpu() for name, total in sums.items()}
