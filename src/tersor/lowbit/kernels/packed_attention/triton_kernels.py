"""The kernels of packed attention on a GPU; `triton.py` says what they compute and launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.lowbit.kernels.triton_runtime import interpreting

#: Columns of a table of parts: addresses, then numbers.
ADDRESSES = (
    *("keys", "values", "key_step", "key_minimum", "value_step", "value_minimum", "channel_scale"),
    *("key_factor", "value_factor", "positions", "valid"),
)
NUMBERS = ("tokens", "parameter_heads", "key_factor_heads", "value_factor_heads", "position_heads", "valid_heads")
# The same columns as the kernel knows them.
# fmt: off
(
    KEYS, VALUES, KEY_STEP, KEY_MINIMUM, VALUE_STEP, VALUE_MINIMUM, CHANNEL_SCALE, KEY_FACTOR, VALUE_FACTOR,
    POSITION, VALID_SLOTS,
    TOKENS, PARAMETER_HEADS, KEY_FACTOR_HEADS, VALUE_FACTOR_HEADS, POSITION_HEADS, VALID_HEADS,
) = map(tl.constexpr, range(len(ADDRESSES) + len(NUMBERS)))
# fmt: on
COLUMN_COUNT = tl.constexpr(len(ADDRESSES) + len(NUMBERS))


@triton.jit
def _tile(base, token, here, inner, BITS: tl.constexpr, DIM: tl.constexpr, BYTES: tl.constexpr, WIDTH: tl.constexpr):
    """Rows ``token`` of a part: bytes that hold several slots, whole 3-bit codes, or raw numbers."""
    inside = here[:, None] & (inner < WIDTH)[None, :]
    row = base + token.to(tl.int64)[:, None] * BYTES
    if BITS == 3:
        LOW: tl.constexpr = (DIM + 3) // 4
        HIGH: tl.constexpr = BYTES - LOW
        low = tl.load(row + (inner % LOW)[None, :], mask=inside, other=0)
        high = tl.load(row + (LOW + inner % HIGH)[None, :], mask=inside, other=0)
        low = (low >> (inner // LOW * 2).to(tl.uint8)[None, :]) & 3
        return low + ((high >> (inner // HIGH).to(tl.uint8)[None, :]) & 1) * 4
    return tl.load(row + inner[None, :], mask=inside, other=0)


@triton.jit
def _slot(loaded, slot: tl.constexpr, BITS: tl.constexpr):
    """The numbers of one slot of a loaded tile as float32."""
    numbers = loaded if BITS == 16 or BITS == 3 else (loaded >> (slot * BITS)) & ((1 << BITS) - 1)
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


@triton.jit
def _of_head(row, HEADS: tl.constexpr, batch, head):
    """Which of a tensor's ``[batch, 1 or kv_heads]`` runs belongs to a head; its number of heads stands in a column."""
    heads = tl.load(row + HEADS)
    return batch * heads + head * (heads > 1)


# One fixed choice in the interpreter, which has no clock to choose by.
_CONFIGS = [
    triton.Config({"BLOCK_TOKENS": tokens}, num_warps=warps)
    for tokens in ((64,) if interpreting() else (32, 64, 128))
    for warps in ((4,) if interpreting() else (2, 4))
]


# Numbers that change from step to step or from batch to batch: a kernel of its own for multiples of 16 gains nothing.
_UNSPECIALIZED = [
    *("split_tokens", "window_tokens", "window_slots", "sequence", "bias_width", "rows", "queries", "kv_heads"),
    *("all_rows", "mask_batch", "mask_query"),
]


@triton.autotune(_CONFIGS, key=["KEY_BITS", "KEY_DIM", "VALUE_BITS", "VALUE_DIM", "BLOCK_ROWS", "PRECISION"])
@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attend(
    query,
    table,
    splits,
    split_tokens,
    window_keys,
    window_values,
    window_tokens,
    window_slots,
    valid_window,
    score_bias,
    bias_width,
    mask,
    sequence,
    mask_batch,
    mask_query,
    mask_token,
    peak,
    total,
    output,
    scaling,
    rows,
    queries,
    kv_heads,
    all_rows,
    KEY_BITS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    KEYS_TYPE: tl.constexpr,
    VALUES_TYPE: tl.constexpr,
    KEY_STEP_TYPE: tl.constexpr,
    KEY_MINIMUM_TYPE: tl.constexpr,
    VALUE_STEP_TYPE: tl.constexpr,
    VALUE_MINIMUM_TYPE: tl.constexpr,
    CHANNEL_SCALE_TYPE: tl.constexpr,
    KEY_FACTOR_TYPE: tl.constexpr,
    VALUE_FACTOR_TYPE: tl.constexpr,
    POSITIONS: tl.constexpr,
    VALID: tl.constexpr,
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
    if table is None:
        start = tl.program_id(1) * split_tokens
        tokens = window_tokens
        keys = window_keys + place * window_slots * KEY_BYTES
        values = window_values + place * window_slots * VALUE_BYTES
        key_step, key_minimum, channel_scale = None, None, None
    else:
        part = tl.load(splits + 2 * tl.program_id(1))
        start = tl.load(splits + 2 * tl.program_id(1) + 1)
        part = part.to(tl.int64) * COLUMN_COUNT
        tokens = tl.load(table + part + TOKENS).to(tl.int32)
        keys = tl.load(table + part + KEYS).to(tl.pointer_type(KEYS_TYPE)) + place * tokens * KEY_BYTES
        values = tl.load(table + part + VALUES).to(tl.pointer_type(VALUES_TYPE)) + place * tokens * VALUE_BYTES
        if KEY_BITS == 16:
            key_step, key_minimum, channel_scale = None, None, None
        else:
            key_step = tl.load(table + part + KEY_STEP).to(tl.pointer_type(KEY_STEP_TYPE)) + place * KEY_DIM
            key_minimum = tl.load(table + part + KEY_MINIMUM).to(tl.pointer_type(KEY_MINIMUM_TYPE)) + place * KEY_DIM
            channel_scale = tl.load(table + part + CHANNEL_SCALE).to(tl.pointer_type(CHANNEL_SCALE_TYPE))
            channel_scale += place * VALUE_DIM
            own = _of_head(table + part, PARAMETER_HEADS, batch, head) * tokens
            value_step = tl.load(table + part + VALUE_STEP).to(tl.pointer_type(VALUE_STEP_TYPE)) + own
            value_minimum = tl.load(table + part + VALUE_MINIMUM).to(tl.pointer_type(VALUE_MINIMUM_TYPE)) + own
        if KEY_FACTOR_TYPE is not None:
            own = _of_head(table + part, KEY_FACTOR_HEADS, batch, head) * tokens
            key_factor = tl.load(table + part + KEY_FACTOR).to(tl.pointer_type(KEY_FACTOR_TYPE)) + own
        if VALUE_FACTOR_TYPE is not None:
            own = _of_head(table + part, VALUE_FACTOR_HEADS, batch, head) * tokens
            value_factor = tl.load(table + part + VALUE_FACTOR).to(tl.pointer_type(VALUE_FACTOR_TYPE)) + own
        if POSITIONS:
            own = _of_head(table + part, POSITION_HEADS, batch, head) * tokens
            positions = tl.load(table + part + POSITION).to(tl.pointer_type(tl.int32)) + own
        if VALID:
            own = _of_head(table + part, VALID_HEADS, batch, head) * tokens
            valid = tl.load(table + part + VALID_SLOTS).to(tl.pointer_type(tl.uint8)) + own

    query0, bias = _folded_query(query, key_step, key_minimum, row, key_inner, scaling, rows, 0, KEY_DIM, KEY_WIDTH)
    if KEY_BITS == 4 or KEY_BITS == 2:
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
    for first in range(start, tl.minimum(start + split_tokens, tokens), BLOCK_TOKENS):
        token = first + tl.arange(0, BLOCK_TOKENS)
        here = token < tokens

        loaded = tl.trans(_tile(keys, token, here, key_inner, KEY_BITS, KEY_DIM, KEY_BYTES, KEY_WIDTH))
        scores = tl.dot(query0, _slot(loaded, 0, KEY_BITS), input_precision=PRECISION)
        if KEY_BITS == 4 or KEY_BITS == 2:
            scores = tl.dot(query1, _slot(loaded, 1, KEY_BITS), scores, input_precision=PRECISION)
        if KEY_BITS == 2:
            scores = tl.dot(query2, _slot(loaded, 2, KEY_BITS), scores, input_precision=PRECISION)
            scores = tl.dot(query3, _slot(loaded, 3, KEY_BITS), scores, input_precision=PRECISION)
        scores += bias[:, None]
        if KEY_FACTOR_TYPE is not None:
            scores *= tl.load(key_factor + token, mask=here, other=0.0).to(tl.float32)[None, :]
        seen = here[None, :] & (row < rows)[:, None]
        if table is None:
            column = sequence - tokens + token
            if mask is None:  # a query sees no later token
                seen = seen & (token[None, :] <= (tokens - queries + row % queries)[:, None])
            if valid_window is not None:
                opened = tl.load(valid_window + batch * window_slots + token, mask=here, other=0)
                seen = seen & (opened != 0)[None, :]
        elif POSITIONS:
            column = tl.load(positions + token, mask=here, other=0)
        if VALID:
            seen = seen & (tl.load(valid + token, mask=here, other=0) != 0)[None, :]
        if score_bias is not None and POSITIONS:
            added = (place * rows + row)[:, None] * bias_width + column[None, :]
            scores += tl.load(score_bias + added, mask=seen, other=0.0)
        if mask is not None and (table is None or POSITIONS):
            at = batch * mask_batch + (row % queries)[:, None] * mask_query + column[None, :] * mask_token
            seen = seen & (tl.load(mask + at, mask=seen, other=0) != 0)
        scores = tl.where(seen, scores, float("-inf"))

        raised = tl.maximum(highest, tl.max(scores, 1))
        # A row that has seen no open token yet keeps -inf; shift by 0 there, so that exp gives 0, not NaN.
        shift = tl.where(raised == float("-inf"), 0.0, raised)
        weights = tl.exp(scores - shift[:, None])
        decay = tl.exp(highest - shift)
        highest = raised
        exponentials = exponentials * decay + tl.sum(weights, 1)
        if VALUE_FACTOR_TYPE is not None:
            weights *= tl.load(value_factor + token, mask=here, other=0.0).to(tl.float32)[None, :]
        if KEY_BITS != 16:
            minimum = tl.load(value_minimum + token, mask=here, other=0.0).to(tl.float32)
            minima = minima * decay + tl.sum(weights * minimum[None, :], 1)
            weights *= tl.load(value_step + token, mask=here, other=0.0).to(tl.float32)[None, :]

        loaded = _tile(values, token, here, value_inner, VALUE_BITS, VALUE_DIM, VALUE_BYTES, VALUE_WIDTH)
        sum0 = tl.dot(weights, _slot(loaded, 0, VALUE_BITS), sum0 * decay[:, None], input_precision=PRECISION)
        if VALUE_BITS == 4 or VALUE_BITS == 2:
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
    if VALUE_BITS == 4 or VALUE_BITS == 2:
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
