"""Few rows of activations: every weight is read once and multiplied in float32 as it comes, with no tensor core.

A program is one warp that owns ``BN`` rows of weights and a share of the inputs. With one warp a tile of activations
needs no exchange through shared memory, so there is no barrier in the loop. Shares of a row of weights are added by
:func:`reduce` in a fixed order: the result does not depend on which program is first.

The rows of ``right``, the low-rank term's first factor, are further rows of weights in the same launch; its second
factor meets their sums in :func:`reduce`, so the activations are read once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from quantlab_kernels.gpu.configs import GemvConfig
from quantlab_kernels.gpu.decode import input_factor, load, load_table, load_words, values, window
from quantlab_kernels.gpu.formats import INTEGER, TABLE16
from quantlab_kernels.gpu.weight import Kind


@triton.jit(do_not_specialize=["magic"])
def gemv(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, table_ptr, right_ptr, partial_ptr,
    columns, out_features, quads, groups, x_stride, chunk, right_columns, blocks, outputs, magic, factor, fold,
    BITS: tl.constexpr, WIDTH: tl.constexpr, LANE: tl.constexpr, WORDS: tl.constexpr, PARTS: tl.constexpr,
    PLANES: tl.constexpr, WINDOWS: tl.constexpr,
    DECODE: tl.constexpr, OFFSET: tl.constexpr, SCALED: tl.constexpr, ASM: tl.constexpr,
    UNIT_LANES: tl.constexpr, GROUP_UNITS: tl.constexpr, ZEROS: tl.constexpr, FOLD: tl.constexpr,
    FULL: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Partial sums of ``x @ W.T``: float32 ``[splits, ROWS, outputs]``, or of one share in any dtype: the product.

    Args:
        x_ptr: float16 or bfloat16 ``[ROWS, columns]``, rows ``x_stride`` apart.
        words_ptr: int32 ``[out_features, WORDS, lanes]``, see :mod:`quantlab_kernels.gpu.layout`.
        scales_ptr: ``[out_features, groups]``; zeros_ptr likewise, read if ``ZEROS``.
        right_ptr: ``[RANK, right_columns]`` in the dtype of ``x``, read if ``RANK``.
        quads: lanes in fours, so that the compiler knows of every row that it begins where a 128-bit load may.
        chunk: likewise, of a program's share.
        blocks: programs along the rows of weights; those from there on have rows of ``right``.
        outputs: ``out_features + RANK``.
        factor, fold: see :class:`quantlab_kernels.gpu.formats.Reading`.
        GROUP_UNITS: units that have one scale; 0 if a whole row has one.
        FOLD: whether the sum of the activations is needed for ``fold``.
        FULL: every share is of whole tiles, and no row is padded: nothing needs to be masked.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    partial_ptr += split * ROWS * outputs
    lanes, share = quads * 4, chunk * 4
    if block < blocks:
        _rows_of_codes(
            x_ptr, words_ptr, scales_ptr, zeros_ptr, table_ptr, partial_ptr,
            columns, out_features, lanes, groups, x_stride, block * BN, split * share, share, outputs,
            magic, factor, fold, BITS, WIDTH, LANE, WORDS, PARTS, PLANES, WINDOWS, DECODE, OFFSET, SCALED, ASM,
            UNIT_LANES, GROUP_UNITS, ZEROS, FOLD, FULL, ROWS, BN, BL,
        )  # fmt: skip
    elif RANK:
        _rows_of_right(
            x_ptr, right_ptr, partial_ptr + out_features, x_stride, right_columns, (block - blocks) * BN,
            split * share * LANE, tl.minimum(columns, (split + 1) * share * LANE), outputs, RANK, ROWS, BN,
        )  # fmt: skip


@triton.jit
def _rows_of_codes(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, table_ptr, partial_ptr,
    columns, out_features, lanes, groups, x_stride, first_row, first_lane, share, outputs, magic, factor, fold,
    BITS: tl.constexpr, WIDTH: tl.constexpr, LANE: tl.constexpr, WORDS: tl.constexpr, PARTS: tl.constexpr,
    PLANES: tl.constexpr, WINDOWS: tl.constexpr,
    DECODE: tl.constexpr, OFFSET: tl.constexpr, SCALED: tl.constexpr, ASM: tl.constexpr,
    UNIT_LANES: tl.constexpr, GROUP_UNITS: tl.constexpr, ZEROS: tl.constexpr, FOLD: tl.constexpr,
    FULL: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    # The lanes of a 128-bit load that have one scale are added before it is applied.
    TOGETHER: tl.constexpr = min(4, UNIT_LANES)
    SUMS: tl.constexpr = BL // TOGETHER
    PAIRS: tl.constexpr = 16 // WIDTH
    row = first_row + tl.arange(0, BN)
    own = tl.minimum(row, out_features - 1)
    own_words = words_ptr + own.to(tl.int64)[:, None] * (WORDS * lanes)
    table = load_table(table_ptr, magic, DECODE, ASM)
    sums = ()
    inputs = ()
    for _ in tl.static_range(ROWS):
        sums += (tl.zeros([BN, SUMS], tl.float32),)
        inputs += (tl.zeros([SUMS], tl.float32),)
    for lane0 in range(first_lane, tl.minimum(first_lane + share, lanes), BL):
        lane = lane0 + tl.arange(0, BL)
        words = load_words(own_words + lane[None, :], None if FULL else (lane < lanes)[None, :], lanes, WORDS)
        element = lane0 * 2 + tl.arange(0, 2 * BL)
        start = element // (2 * UNIT_LANES) * (UNIT_LANES * LANE) + element % (2 * UNIT_LANES)
        step = ()
        totals = ()
        for w in tl.static_range(WINDOWS):
            decoded = values(window(words, w, PARTS, PLANES), table, magic, DECODE, BITS, WIDTH, SCALED, OFFSET, ASM)
            for j in tl.static_range(PAIRS):
                column = start + (w * PAIRS + j) * (2 * UNIT_LANES)
                products = ()
                added = ()
                for m in tl.static_range(ROWS):
                    x = load(x_ptr + m * x_stride + column, None if FULL else column < columns).to(tl.float32)
                    first, second = tl.split(tl.reshape(x, [BL, 2]))
                    near = first * input_factor(DECODE, SCALED, BITS, WIDTH, j, 0)
                    far = second * input_factor(DECODE, SCALED, BITS, WIDTH, j, 1)
                    if w == 0 and j == 0:
                        products += (near[None, :] * decoded[0] + far[None, :] * decoded[1],)
                        added += (first + second,)
                    else:
                        product = step[m] + near[None, :] * decoded[2 * j]
                        products += (product + far[None, :] * decoded[2 * j + 1],)
                        added += (totals[m] + (first + second),)
                step = products
                totals = added
        if GROUP_UNITS:
            group = (lane0 + tl.arange(0, SUMS) * TOGETHER) // (UNIT_LANES * GROUP_UNITS)
            at = own[:, None] * groups + tl.minimum(group, groups - 1)[None, :]
            scale = tl.load(scales_ptr + at).to(tl.float32)
            if ZEROS:
                subtracted = tl.load(zeros_ptr + at).to(tl.float32) + fold
        scaled_sums = ()
        scaled_inputs = ()
        for m in tl.static_range(ROWS):
            term = tl.sum(tl.reshape(step[m], [BN, SUMS, TOGETHER]), 2) * factor
            total = tl.sum(tl.reshape(totals[m], [SUMS, TOGETHER]), 1)
            if GROUP_UNITS:
                if ZEROS:
                    term -= subtracted * total[None, :]
                elif FOLD:
                    term -= (total * fold)[None, :]
                scaled_sums += (sums[m] + term * scale,)
                scaled_inputs += (inputs[m],)
            else:
                scaled_sums += (sums[m] + term,)
                scaled_inputs += (inputs[m] + total,)
        sums = scaled_sums
        inputs = scaled_inputs
    for m in tl.static_range(ROWS):
        y = tl.sum(sums[m], 1)
        if not GROUP_UNITS:
            if ZEROS:
                y -= (tl.load(zeros_ptr + own).to(tl.float32) + fold) * tl.sum(inputs[m], 0)
            elif FOLD:
                y -= fold * tl.sum(inputs[m], 0)
            y *= tl.load(scales_ptr + own).to(tl.float32)
        tl.store(partial_ptr + m * outputs + row, y.to(partial_ptr.dtype.element_ty), mask=row < out_features)


@triton.jit
def _rows_of_right(
    x_ptr, right_ptr, partial_ptr, x_stride, right_columns, first_row, first, last, outputs,
    RANK: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    BK: tl.constexpr = 256
    row = first_row + tl.arange(0, BN)
    own = tl.minimum(row, RANK - 1)
    sums = ()
    for _ in tl.static_range(ROWS):
        sums += (tl.zeros([BN, BK], tl.float32),)
    for start in range(first, last, BK):
        column = start + tl.arange(0, BK)
        live = column < last
        weight = tl.load(right_ptr + own[:, None] * right_columns + column[None, :], mask=live[None, :], other=0.0)
        added = ()
        for m in tl.static_range(ROWS):
            x = tl.load(x_ptr + m * x_stride + column, mask=live, other=0.0).to(tl.float32)
            added += (sums[m] + x[None, :] * weight.to(tl.float32),)
        sums = added
    for m in tl.static_range(ROWS):
        tl.store(partial_ptr + m * outputs + row, tl.sum(sums[m], 1), mask=row < RANK)


@triton.jit
def reduce(
    partial_ptr, hidden_ptr, bias_ptr, left_ptr, y_ptr,
    out_features, outputs, hidden_outputs, rows, y_stride, left_columns,
    SPLITS: tl.constexpr, HIDDEN_SPLITS: tl.constexpr, BIAS: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``y``: the partial sums added from the first share to the last, the low-rank term, and the bias; rounded once.

    Args:
        partial_ptr: float32 ``[SPLITS, rows, outputs]``, of which the first ``out_features`` are read.
        hidden_ptr: float32 ``[HIDDEN_SPLITS, rows, hidden_outputs]``: shares of ``x @ right.T``, the first ``RANK``
            columns.
        left_ptr: ``[out_features, RANK]``, rows ``left_columns`` apart.
        y_ptr: ``[rows, out_features]``, rows ``y_stride`` apart.
        RANK_BLOCK: the power of two from ``RANK`` on.
    """
    m = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    live = n < out_features
    y = tl.zeros([BN], tl.float32)
    for split in range(SPLITS):
        y += tl.load(partial_ptr + (split * rows + m).to(tl.int64) * outputs + n, mask=live, other=0.0)
    if RANK:
        r = tl.arange(0, RANK_BLOCK)
        hidden = tl.zeros([RANK_BLOCK], tl.float32)
        for split in range(HIDDEN_SPLITS):
            hidden += tl.load(hidden_ptr + (split * rows + m) * hidden_outputs + r, mask=r < RANK, other=0.0)
        left = tl.load(
            left_ptr + n[:, None] * left_columns + r[None, :], mask=live[:, None] & (r < RANK)[None, :], other=0.0
        )
        y += tl.sum(left.to(tl.float32) * hidden[None, :], 1)
    if BIAS:
        y += tl.load(bias_ptr + n, mask=live, other=0.0).to(tl.float32)
    tl.store(y_ptr + m.to(tl.int64) * y_stride + n, y.to(y_ptr.dtype.element_ty), mask=live)


def gemv_constants(
    kind: Kind, half: bool, rank: int, rows: int, config: GemvConfig, full: bool, asm: bool
) -> dict[str, Any]:
    """The ``tl.constexpr`` arguments of :func:`gemv`; ``half``: for float16 activations."""
    return kind.constants() | {
        "SCALED": half,
        "ASM": asm,
        "FOLD": half and kind.format.decode in (INTEGER, TABLE16),
        "FULL": full,
        "RANK": rank,
        "ROWS": rows,
        "BN": config.block_rows,
        "BL": config.block_lanes,
    }
