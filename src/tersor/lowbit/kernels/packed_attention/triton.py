"""Packed attention on a GPU: every part in splits of its tokens, then one merge (split-token decoding).

The algebra is that of the reference: steps go into the query and the weights, minima become one scalar. A program
reads one split of one part for one KV head. Half-split packing shows in the shape of the products: the bytes of a tile
hold its codes in slots of neighbouring channels, so a 4-bit tile takes two products and a 2-bit tile four, each with
the query's channels of that slot, and nothing is interleaved or written back.

Three-bit codes lie in two planes with different slots; those parts, and float64 queries, are computed by the reference
and merged like any other split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.lowbit.codes import AffineCodes
from tersor.lowbit.kernels.packed_attention import PackedPart, Part, reference
from tersor.lowbit.kernels.triton_runtime import interpreting

RAW_BITS = 16
SLOTTED_BITS = (2, 4, 8)
#: Tokens of a split are a multiple of this, the largest block that is tried.
SPLIT_UNIT = 128
#: Rows (query heads of a group times queries) that one program holds in registers.
MAX_ROWS = 64
#: `tl.dot` takes no side shorter than this.
MIN_DOT = 16


def packed_attention(query: Tensor, parts: Sequence[Part], *, scaling: float) -> tuple[Tensor, Tensor]:
    """As `reference.packed_attention`; output and log-sum-exp are float32.

    Raises:
        ValueError: without any part that holds tokens.
    """
    parts = [part for part in parts if _heads_and_tokens(part)[1]]
    if not parts or query.dtype == torch.float64:
        return reference.packed_attention(query, parts, scaling=scaling)
    batch, heads, queries, _ = query.shape
    kv_heads, _ = _heads_and_tokens(parts[0])
    value_dim = _layout(parts[0].values)[1]
    rows = heads // kv_heads * queries
    block_rows = min(MAX_ROWS, max(MIN_DOT, triton.next_power_of_2(rows)))
    programs = batch * kv_heads * triton.cdiv(rows, block_rows)
    splits = [_split(part, programs, query.device) for part in parts]
    places = sum(number for number, _ in splits)
    peak = query.new_empty(places, batch, heads, queries, dtype=torch.float32)
    total = torch.empty_like(peak)
    partial = query.new_empty(places, batch, heads, queries, value_dim, dtype=torch.float32)
    query = query.contiguous()
    place = 0
    for part, (number, split_tokens) in zip(parts, splits, strict=True):
        if _by_reference(part):
            # A finished softmax is a split whose exponentials, taken against its log-sum-exp, add up to one.
            partial[place], peak[place] = reference.packed_attention(query, [part], scaling=scaling)
            total[place] = peak[place].isfinite()
        else:
            _attend[(programs, number)](
                query=query,
                **_arguments(part, batch, queries),
                peak=peak[place:],
                total=total[place:],
                output=partial[place:],
                scaling=scaling,
                split_tokens=split_tokens,
                rows=rows,
                queries=queries,
                kv_heads=kv_heads,
                all_rows=batch * heads * queries,
                BLOCK_ROWS=block_rows,
                # Codes are exact in TF32; three products keep a float32 query exact as well.
                PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
            )
        place += number
    output, lse = torch.empty_like(partial[0]), torch.empty_like(peak[0])
    _merge[(lse.numel(),)](
        peak,
        total,
        partial,
        output,
        lse,
        places,
        lse.numel(),
        VALUE_DIM=value_dim,
        BLOCK_VALUE=triton.next_power_of_2(value_dim),
    )
    return output, lse


def _heads_and_tokens(part: Part) -> tuple[int, int]:
    stored = part.keys.codes if isinstance(part, PackedPart) else part.keys
    return stored.shape[1], stored.shape[2]


def _layout(stored: AffineCodes | Tensor) -> tuple[int, int, int, int]:
    """Bits of a code, channels, codes (or numbers) that lie side by side in a row, and the block that holds those."""
    if isinstance(stored, Tensor):
        bits, dim, width = RAW_BITS, stored.shape[-1], stored.shape[-1]
    else:
        bits, dim, width = stored.bits, stored.dim, stored.codes.shape[-1]
    return bits, dim, width, max(MIN_DOT, triton.next_power_of_2(width))


def _by_reference(part: Part) -> bool:
    return isinstance(part, PackedPart) and not {part.keys.bits, part.values.bits} <= set(SLOTTED_BITS)


def _split(part: Part, programs: int, device: torch.device) -> tuple[int, int]:
    """How many splits a part gets, and the tokens of each: at least two programs a processor where it is long."""
    if _by_reference(part):
        return 1, 0
    _, tokens = _heads_and_tokens(part)
    units = triton.cdiv(tokens, SPLIT_UNIT)
    wanted = triton.cdiv(2 * _processors(device), programs)
    units_each = triton.cdiv(units, min(wanted, units))
    return triton.cdiv(units, units_each), units_each * SPLIT_UNIT


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 16  # the interpreter: enough that long parts of a test meet several splits
    return torch.cuda.get_device_properties(device).multi_processor_count


def _arguments(part: Part, batch: int, queries: int) -> dict[str, Any]:
    """What the kernel is told about one part. Rows that are not there are None, and the kernel skips their loads."""
    kv_heads, tokens = _heads_and_tokens(part)
    tables: dict[str, Tensor | None]
    value_step: Tensor | None
    value_minimum: Tensor | None
    if isinstance(part, PackedPart):
        key_codes, value_codes = part.keys.codes, part.values.codes
        tables = {
            "key_step": _per_channel(part.keys.step, batch, kv_heads),
            "key_minimum": _per_channel(part.keys.minimum, batch, kv_heads),
            "channel_scale": _per_channel(part.channel_scale, batch, kv_heads),
        }
        value_step, value_minimum = part.values.step[..., 0], part.values.minimum[..., 0]
        score_bias = None if part.score_bias is None else part.score_bias.float().contiguous()
    else:
        key_codes, value_codes = part.keys, part.values
        tables = dict.fromkeys(("key_step", "key_minimum", "channel_scale"))
        value_step = value_minimum = score_bias = None
    key_bits, key_dim, key_width, block_key = _layout(part.keys)
    value_bits, value_dim, value_width, block_value = _layout(part.values)
    mask = None if part.mask is None else part.mask.expand(batch, kv_heads, queries, tokens)
    mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
    return {
        "keys": key_codes.contiguous(),
        "values": value_codes.contiguous(),
        **tables,
        **_per_token("value_step", value_step, batch, kv_heads),
        **_per_token("value_minimum", value_minimum, batch, kv_heads),
        **_per_token("key_factor", part.key_factor, batch, kv_heads),
        **_per_token("value_factor", part.value_factor, batch, kv_heads),
        "score_bias": score_bias,
        "mask": mask,
        **dict(zip(("mask_batch", "mask_head", "mask_query", "mask_token"), mask_strides, strict=True)),
        "tokens": tokens,
        "KEY_BITS": key_bits,
        "KEY_DIM": key_dim,
        "KEY_WIDTH": key_width,
        "BLOCK_KEY": block_key,
        "VALUE_BITS": value_bits,
        "VALUE_DIM": value_dim,
        "VALUE_WIDTH": value_width,
        "BLOCK_VALUE": block_value,
    }


def _per_channel(x: Tensor, batch: int, kv_heads: int) -> Tensor:
    return x.expand(batch, kv_heads, 1, -1).contiguous()


def _per_token(name: str, x: Tensor | None, batch: int, kv_heads: int) -> dict[str, Any]:
    """``x`` ``[batch, 1 or kv_heads, tokens]`` with what the kernel adds to reach a sample and a head."""
    if x is None:
        return {name: None, f"{name}_batch": 0, f"{name}_head": 0}
    x = x.contiguous().expand(batch, kv_heads, -1)
    return {name: x, f"{name}_batch": x.stride(0), f"{name}_head": x.stride(1)}


@triton.jit
def _slot(loaded, slot: tl.constexpr, BITS: tl.constexpr):
    """The numbers of one slot of a loaded tile as float32."""
    numbers = loaded if BITS == 16 else (loaded >> (slot * BITS)) & ((1 << BITS) - 1)
    return numbers.to(tl.float32)


@triton.jit
def _folded_query(
    query,
    key_step,
    key_minimum,
    row,
    inner,
    scaling,
    rows,
    slot: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
):
    """The query's channels of one slot times the key steps, and its share of the bias ``q . m``."""
    channel = slot * KEY_WIDTH + inner
    real = (inner < KEY_WIDTH) & (channel < KEY_DIM)
    inside = (row < rows)[:, None] & real[None, :]
    numbers = tl.load(query + row[:, None] * KEY_DIM + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    numbers *= scaling
    bias = tl.zeros_like(tl.sum(numbers, 1))
    if key_step is not None:
        step = tl.load(key_step + channel, mask=real, other=0.0).to(tl.float32)
        minimum = tl.load(key_minimum + channel, mask=real, other=0.0).to(tl.float32)
        bias = tl.sum(numbers * minimum[None, :], 1)
        numbers *= step[None, :]
    return numbers, bias


@triton.jit
def _store_slot(
    output,
    channel_scale,
    weighted,
    row,
    inner,
    rows,
    slot: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
):
    """Write one slot's channels of the weighted values, times the channel scale."""
    channel = slot * VALUE_WIDTH + inner
    real = (inner < VALUE_WIDTH) & (channel < VALUE_DIM)
    if channel_scale is not None:
        weighted *= tl.load(channel_scale + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    tl.store(output + row[:, None] * VALUE_DIM + channel[None, :], weighted, mask=(row < rows)[:, None] & real[None, :])


# One fixed choice in the interpreter, which has no clock to choose by.
_CONFIGS = [
    triton.Config({"BLOCK_TOKENS": tokens}, num_warps=warps)
    for tokens in ((64,) if interpreting() else (32, 64, 128))
    for warps in ((4,) if interpreting() else (2, 4))
]


# Numbers that change from step to step or from batch to batch: a kernel of its own for multiples of 16 gains nothing.
_UNSPECIALIZED = [
    *("tokens", "split_tokens", "rows", "queries", "kv_heads", "all_rows", "mask_batch", "mask_head", "mask_query"),
    *(
        f"{name}_{axis}"
        for name in ("value_step", "value_minimum", "key_factor", "value_factor")
        for axis in ("batch", "head")
    ),
]


@triton.autotune(_CONFIGS, key=["KEY_BITS", "KEY_DIM", "VALUE_BITS", "VALUE_DIM", "BLOCK_ROWS", "PRECISION"])
@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attend(
    query,
    keys,
    key_step,
    key_minimum,
    values,
    value_step,
    value_step_batch,
    value_step_head,
    value_minimum,
    value_minimum_batch,
    value_minimum_head,
    channel_scale,
    key_factor,
    key_factor_batch,
    key_factor_head,
    value_factor,
    value_factor_batch,
    value_factor_head,
    score_bias,
    mask,
    mask_batch,
    mask_head,
    mask_query,
    mask_token,
    peak,
    total,
    output,
    scaling,
    tokens,
    split_tokens,
    rows,
    queries,
    kv_heads,
    all_rows,
    KEY_BITS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """One split of one part for a block of rows of one KV head: row maximum, sum of exponentials, weighted values.

    A row is a (query head within the group, query) pair; the maximum is taken of scores with the bias and factor in.
    """
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    place = (tl.program_id(0) // row_blocks).to(tl.int64)
    batch, head = place // kv_heads, place % kv_heads
    row = tl.program_id(0) % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    key_inner, value_inner = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE)

    query += place * rows * KEY_DIM
    if key_step is not None:
        key_step += place * KEY_DIM
        key_minimum += place * KEY_DIM
        channel_scale += place * VALUE_DIM
        value_step += batch * value_step_batch + head * value_step_head
        value_minimum += batch * value_minimum_batch + head * value_minimum_head
    keys += place * tokens * KEY_WIDTH
    values += place * tokens * VALUE_WIDTH

    query0, bias = _folded_query(query, key_step, key_minimum, row, key_inner, scaling, rows, 0, KEY_DIM, KEY_WIDTH)
    if KEY_BITS <= 4:
        query1, bias1 = _folded_query(
            query, key_step, key_minimum, row, key_inner, scaling, rows, 1, KEY_DIM, KEY_WIDTH
        )
        bias += bias1
    if KEY_BITS == 2:
        query2, bias2 = _folded_query(
            query, key_step, key_minimum, row, key_inner, scaling, rows, 2, KEY_DIM, KEY_WIDTH
        )
        query3, bias3 = _folded_query(
            query, key_step, key_minimum, row, key_inner, scaling, rows, 3, KEY_DIM, KEY_WIDTH
        )
        bias += bias2 + bias3

    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    exponentials = tl.zeros([BLOCK_ROWS], tl.float32)
    minima = tl.zeros([BLOCK_ROWS], tl.float32)
    sum0 = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
    sum1 = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
    sum2 = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
    sum3 = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
    start = tl.program_id(1) * split_tokens
    for first in range(start, tl.minimum(start + split_tokens, tokens), BLOCK_TOKENS):
        token = first + tl.arange(0, BLOCK_TOKENS)
        here = token < tokens

        inside = here[:, None] & (key_inner < KEY_WIDTH)[None, :]
        loaded = tl.trans(tl.load(keys + token[:, None] * KEY_WIDTH + key_inner[None, :], mask=inside, other=0))
        scores = tl.dot(query0, _slot(loaded, 0, KEY_BITS), input_precision=PRECISION)
        if KEY_BITS <= 4:
            scores = tl.dot(query1, _slot(loaded, 1, KEY_BITS), scores, input_precision=PRECISION)
        if KEY_BITS == 2:
            scores = tl.dot(query2, _slot(loaded, 2, KEY_BITS), scores, input_precision=PRECISION)
            scores = tl.dot(query3, _slot(loaded, 3, KEY_BITS), scores, input_precision=PRECISION)
        scores += bias[:, None]
        if key_factor is not None:
            factor = tl.load(key_factor + batch * key_factor_batch + head * key_factor_head + token, mask=here, other=0)
            scores *= factor.to(tl.float32)[None, :]
        seen = here[None, :] & (row < rows)[:, None]
        if score_bias is not None:
            added = (place * rows + row)[:, None] * tokens + token[None, :]
            scores += tl.load(score_bias + added, mask=seen, other=0.0)
        if mask is not None:
            column = batch * mask_batch + head * mask_head + token * mask_token
            opened = tl.load(mask + (row % queries)[:, None] * mask_query + column[None, :], mask=seen, other=0)
            seen = seen & (opened != 0)
        scores = tl.where(seen, scores, float("-inf"))

        raised = tl.maximum(highest, tl.max(scores, 1))
        # A row that has seen no open token yet keeps -inf; shift by 0 there, so that exp gives 0, not NaN.
        shift = tl.where(raised == float("-inf"), 0.0, raised)
        weights = tl.exp(scores - shift[:, None])
        decay = tl.exp(highest - shift)
        highest = raised
        exponentials = exponentials * decay + tl.sum(weights, 1)
        if value_factor is not None:
            factor = tl.load(
                value_factor + batch * value_factor_batch + head * value_factor_head + token, mask=here, other=0
            )
            weights *= factor.to(tl.float32)[None, :]
        if value_step is not None:
            minimum = tl.load(value_minimum + token, mask=here, other=0.0).to(tl.float32)
            minima = minima * decay + tl.sum(weights * minimum[None, :], 1)
            weights *= tl.load(value_step + token, mask=here, other=0.0).to(tl.float32)[None, :]

        inside = here[:, None] & (value_inner < VALUE_WIDTH)[None, :]
        loaded = tl.load(values + token[:, None] * VALUE_WIDTH + value_inner[None, :], mask=inside, other=0)
        sum0 = tl.dot(weights, _slot(loaded, 0, VALUE_BITS), sum0 * decay[:, None], input_precision=PRECISION)
        if VALUE_BITS <= 4:
            sum1 = tl.dot(weights, _slot(loaded, 1, VALUE_BITS), sum1 * decay[:, None], input_precision=PRECISION)
        if VALUE_BITS == 2:
            sum2 = tl.dot(weights, _slot(loaded, 2, VALUE_BITS), sum2 * decay[:, None], input_precision=PRECISION)
            sum3 = tl.dot(weights, _slot(loaded, 3, VALUE_BITS), sum3 * decay[:, None], input_precision=PRECISION)

    target = tl.program_id(1).to(tl.int64) * all_rows + place * rows
    tl.store(peak + target + row, highest, mask=row < rows)
    tl.store(total + target + row, exponentials, mask=row < rows)
    output += target * VALUE_DIM
    shared = minima[:, None]
    _store_slot(output, channel_scale, sum0 + shared, row, value_inner, rows, 0, VALUE_DIM, VALUE_WIDTH)
    if VALUE_BITS <= 4:
        _store_slot(output, channel_scale, sum1 + shared, row, value_inner, rows, 1, VALUE_DIM, VALUE_WIDTH)
    if VALUE_BITS == 2:
        _store_slot(output, channel_scale, sum2 + shared, row, value_inner, rows, 2, VALUE_DIM, VALUE_WIDTH)
        _store_slot(output, channel_scale, sum3 + shared, row, value_inner, rows, 3, VALUE_DIM, VALUE_WIDTH)


@triton.jit(do_not_specialize=["places", "all_rows"])
def _merge(peak, total, partial, output, lse, places, all_rows, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr):
    """Fold the splits of one row into its output and log-sum-exp; a row that may look nowhere gets 0 and -inf."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_VALUE)
    highest = float("-inf")
    for place in range(places):
        highest = tl.maximum(highest, tl.load(peak + place * all_rows + row))
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    exponentials = 0.0
    weighted = tl.zeros([BLOCK_VALUE], tl.float32)
    for place in range(places):
        source = place * all_rows + row
        decay = tl.exp(tl.load(peak + source) - shift)
        exponentials += decay * tl.load(total + source)
        weighted += decay * tl.load(partial + source * VALUE_DIM + channel, mask=channel < VALUE_DIM, other=0.0)
    open_row = exponentials > 0.0
    exponentials = tl.where(open_row, exponentials, 1.0)
    tl.store(output + row * VALUE_DIM + channel, weighted / exponentials, mask=channel < VALUE_DIM)
    tl.store(lse + row, tl.where(open_row, shift + tl.log(exponentials), float("-inf")))
