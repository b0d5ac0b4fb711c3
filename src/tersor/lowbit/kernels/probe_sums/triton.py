"""Probe sums on a GPU: one launch for the rows' log-sum-exp, one that sums each block of columns over all rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.lowbit.kernels import mask_strides, triton_runtime
from tersor.lowbit.kernels.probe_sums import has_gradient, reference

BLOCK_ROWS, BLOCK_COLUMNS = 64, 64


def probe_sums(
    query: Tensor,
    keys: Tensor,
    rows: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    lse: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """As `reference.probe_sums`, which does float64, soft caps and gradients."""
    batch, heads, added, dim = query.shape
    kv_heads, columns = keys.shape[1:3]
    alike = query.dtype != torch.float64 and keys.dtype == query.dtype
    if not alike or softcap is not None or has_gradient(query, keys):
        return reference.probe_sums(query, keys, rows, scaling=scaling, softcap=softcap, lse=lse, allowed=allowed)
    count = len(rows)
    strides = (0, 0, 0) if allowed is None else mask_strides(allowed[:, None])
    shared = (
        query, keys, rows, allowed, *query.stride()[:3], *keys.stride()[:3], *strides,
        count, columns, columns - added, scaling,
    )  # fmt: skip
    sizes = {
        "GROUP": heads // kv_heads, "DIM": dim, "BLOCK_DIM": max(16, triton.next_power_of_2(dim)),
        "BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS,
        # Half precision multiplies on tensor cores, and exactly; the interpreter knows no bfloat16 products.
        "WIDE": query.dtype == torch.float32 or triton_runtime.interpreting(),
    }  # fmt: skip
    if lse is None:
        known = torch.empty(batch, heads, count, dtype=torch.float32, device=query.device)
        _row_lse[(triton.cdiv(count, BLOCK_ROWS), heads, batch)](*shared, known, *known.stride()[:2], **sizes)
    else:
        known = lse[:, :, rows].float()
    sums = torch.empty(batch, kv_heads, columns, dtype=torch.float32, device=query.device)
    _column_sums[(triton.cdiv(columns, BLOCK_COLUMNS), kv_heads, batch)](
        *shared, known, *known.stride()[:2], sums, **sizes
    )
    return sums


_UNSPECIALIZED = ["count", "columns", "before", "mask_sample", "mask_row"]


@triton.jit
def _scores(
    query, keys, rows, allowed, query_token, key_token, mask_row, mask_column,
    row, column, count, columns, before, scaling,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Scores of a block of probe rows and a block of columns; -inf where a row may not look."""
    channel = tl.arange(0, BLOCK_DIM)
    here = row < count
    token = tl.load(rows + row, mask=here, other=0)
    at = query + token[:, None] * query_token + channel[None, :]
    own = tl.load(at, mask=here[:, None] & (channel < DIM)[None, :], other=0.0)
    at = keys + column[None, :].to(tl.int64) * key_token + channel[:, None]
    key = tl.load(at, mask=(column < columns)[None, :] & (channel < DIM)[:, None], other=0.0)
    if WIDE:
        score = tl.dot(own.to(tl.float32), key.to(tl.float32), input_precision="ieee") * scaling
    else:
        score = tl.dot(own, key) * scaling
    opened = here[:, None] & (column < columns)[None, :]
    if allowed is None:
        opened = opened & (column[None, :] <= token[:, None] + before)
    else:
        at = allowed + row[:, None].to(tl.int64) * mask_row + column[None, :] * mask_column
        opened = opened & (tl.load(at, mask=opened, other=0) != 0)
    return tl.where(opened, score, float("-inf"))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _row_lse(
    query, keys, rows, allowed, query_sample, query_head, query_token, key_sample, key_head, key_token,
    mask_sample, mask_row, mask_column, count, columns, before, scaling, lse, lse_sample, lse_head,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a block of probe rows of one head; infinite where a row holds NaN or nothing to look at."""
    head, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    query += sample * query_sample + head * query_head
    keys += sample * key_sample + head // GROUP * key_head
    if allowed is not None:
        allowed += sample * mask_sample
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    strange = tl.zeros([BLOCK_ROWS], tl.int32)
    for start in range(0, columns, BLOCK_COLUMNS):
        score = _scores(
            query, keys, rows, allowed, query_token, key_token, mask_row, mask_column,
            row, start + tl.arange(0, BLOCK_COLUMNS), count, columns, before, scaling, DIM, BLOCK_DIM, WIDE,
        )  # fmt: skip
        finite = score < float("inf")  # neither NaN nor infinity
        strange += tl.sum(tl.where(finite, 0, 1), 1)
        score = tl.where(finite, score, float("-inf"))
        larger = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(score - shift[:, None]), 1)
        top = larger
    # A row of infinite sum gives nothing.
    known = tl.where((strange == 0) & (total > 0), top + tl.log(tl.where(total > 0, total, 1.0)), float("inf"))
    tl.store(lse + sample * lse_sample + head * lse_head + row, known, mask=row < count)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _column_sums(
    query, keys, rows, allowed, query_sample, query_head, query_token, key_sample, key_head, key_token,
    mask_sample, mask_row, mask_column, count, columns, before, scaling, lse, lse_sample, lse_head, sums,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Weights of a block of columns, summed over the probe rows of all query heads of one KV head."""
    head, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    keys += sample * key_sample + head * key_head
    if allowed is not None:
        allowed += sample * mask_sample
    total = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for member in range(GROUP):
        which = head * GROUP + member
        for start in range(0, count, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)
            score = _scores(
                query + sample * query_sample + which * query_head, keys, rows, allowed,
                query_token, key_token, mask_row, mask_column,
                row, column, count, columns, before, scaling, DIM, BLOCK_DIM, WIDE,
            )  # fmt: skip
            known = tl.load(lse + sample * lse_sample + which * lse_head + row, mask=row < count, other=float("inf"))
            counts = (known < float("inf"))[:, None] & (score < float("inf"))
            shift = tl.where(known < float("inf"), known, 0.0)
            weight = tl.where(counts, tl.exp(tl.where(counts, score - shift[:, None], 0.0)), 0.0)
            total += tl.sum(weight, 0) / GROUP
    at = sums + (sample * tl.num_programs(1) + head) * columns + column
    tl.store(at, total, mask=column < columns)
