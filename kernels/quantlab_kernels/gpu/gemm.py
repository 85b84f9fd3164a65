"""More rows: weights decoded to 16 bits in registers and multiplied on tensor cores.

The product is computed transposed, ``W @ x.T``: weights come out of registers, where tensor cores take their first
operand from, and never see shared memory; and few rows of activations fill the narrow side of a tile (8 or 16) and
not the wide one. Codes are scaled before the product, in the dtype of the activations, and
rounded once. So that this has room for any scale, a row's scales are divided by a power of two (its largest weight
becomes 1 to 2), which the sums are multiplied with.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from quantlab_kernels.gpu.configs import GemmConfig
from quantlab_kernels.gpu.decode import load, load_table, load_words, weights, window
from quantlab_kernels.gpu.weight import Kind


@triton.jit(do_not_specialize=["magic"])
def gemm(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, table_ptr, powers_ptr, bias_ptr, y_ptr,
    rows, columns, out_features, quads, groups, x_stride, y_stride, split_stride, chunk, magic, factor,
    BITS: tl.constexpr, WIDTH: tl.constexpr, LANE: tl.constexpr, WORDS: tl.constexpr, PARTS: tl.constexpr,
    PLANES: tl.constexpr, WINDOWS: tl.constexpr,
    DECODE: tl.constexpr, OFFSET: tl.constexpr, ASM: tl.constexpr, UPCAST: tl.constexpr,
    UNIT_LANES: tl.constexpr, GROUP_UNITS: tl.constexpr, ZEROS: tl.constexpr, FULL: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """``y = x @ W.T`` (``+ bias``), or one share of the inputs for each third program id.

    Args:
        x_ptr: float16 or bfloat16 ``[rows, columns]``, rows ``x_stride`` apart.
        words_ptr: int32 ``[out_features, WORDS, lanes]``, see :mod:`quantlab_kernels.gpu.layout`.
        scales_ptr: ``[out_features, groups]``; zeros_ptr likewise, read if ``ZEROS``.
        powers_ptr: float32 ``[2, out_features]``: what the scales of a row are multiplied with, and what its sums are.
        y_ptr: ``[rows, out_features]``, of any float dtype; shares are ``split_stride`` apart.
        quads: lanes in fours, so that the compiler knows of every row that it begins where a 128-bit load may.
        chunk: likewise, of a share.
        factor: of what is read out of codes, see :class:`quantlab_kernels.gpu.formats.Reading`.
        GROUP_UNITS: units that have one scale; 0 if a whole row has one.
        UPCAST: multiply in float32, for the interpreter, which can't in bfloat16.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    PAIRS: tl.constexpr = 16 // WIDTH
    split = tl.program_id(2)
    lanes, share = quads * 4, chunk * 4
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    own = tl.minimum(n, out_features - 1)
    own_x = x_ptr + m.to(tl.int64)[:, None] * x_stride
    # Rows that are not there are not read: all programs read all activations, and out of one part of the cache.
    there = (m < rows)[:, None]
    own_words = words_ptr + own.to(tl.int64)[:, None] * (WORDS * lanes)
    table = load_table(table_ptr, magic, DECODE, ASM)
    if GROUP_UNITS:
        down = tl.load(powers_ptr + own)[:, None]
    elif ZEROS:
        row_zero = (tl.load(zeros_ptr + own).to(tl.float32) / factor).to(DTYPE)[:, None]
    sums = tl.zeros([BN, BM], tl.float32)
    for lane0 in range(split * share, tl.minimum(split * share + share, lanes), BL):
        lane = lane0 + tl.arange(0, BL)
        words = load_words(own_words + lane[None, :], None if FULL else (lane < lanes)[None, :], lanes, WORDS)
        scale, zero = 0.0, 0.0
        if GROUP_UNITS:
            group = tl.minimum(lane // (UNIT_LANES * GROUP_UNITS), groups - 1)
            at = own[:, None] * groups + group[None, :]
            scale = (tl.load(scales_ptr + at).to(tl.float32) * down * factor).to(DTYPE)
            if ZEROS:
                zero = (tl.load(zeros_ptr + at).to(tl.float32) / factor).to(DTYPE)
        elif ZEROS:
            zero = tl.broadcast_to(row_zero, [BN, BL])
        element = lane0 * 2 + tl.arange(0, 2 * BL)
        start = element // (2 * UNIT_LANES) * (UNIT_LANES * LANE) + element % (2 * UNIT_LANES)
        for w in tl.static_range(WINDOWS):
            win = window(words, w, PARTS, PLANES)
            decoded = weights(
                win, scale, zero, table, magic, DTYPE, DECODE, BITS, WIDTH, OFFSET, ZEROS, GROUP_UNITS > 0, ASM
            )
            for j in tl.static_range(PAIRS):
                column = start + (w * PAIRS + j) * (2 * UNIT_LANES)
                x = load(own_x + column[None, :], there if FULL else there & (column < columns)[None, :])
                weight = tl.reshape(tl.join(decoded[2 * j], decoded[2 * j + 1]), [BN, 2 * BL])
                if UPCAST:
                    sums += tl.dot(weight.to(tl.float32), tl.trans(x.to(tl.float32)), input_precision="ieee")
                else:
                    sums = tl.dot(weight, tl.trans(x), sums)
    if GROUP_UNITS:
        y = sums * tl.load(powers_ptr + out_features + own)[:, None]
    else:
        y = sums * (tl.load(scales_ptr + own).to(tl.float32) * factor)[:, None]
    if BIAS:
        y += tl.load(bias_ptr + own).to(tl.float32)[:, None]
    y_ptr += split.to(tl.int64) * split_stride
    at = m.to(tl.int64)[None, :] * y_stride + n[:, None]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(n < out_features)[:, None] & (m < rows)[None, :])


def gemm_constants(
    kind: Kind, config: GemmConfig, full: bool, bias: bool, asm: bool, upcast: bool = False
) -> dict[str, Any]:
    """The ``tl.constexpr`` arguments of :func:`gemm`."""
    return kind.constants() | {
        "ASM": asm,
        "UPCAST": upcast,
        "FULL": full,
        "BIAS": bias,
        "BM": config.block_m,
        "BN": config.block_n,
        "BL": config.lanes(kind.format.bits),
    }
