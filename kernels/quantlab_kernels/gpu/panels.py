"""Many rows: a panel of weights decoded into the cache, and multiplied there by the library's GEMM.

Where a product is bound by arithmetic the best one can do with codes is to be rid of them soon. A panel is small enough
to stay in the cache of a large GPU between the kernel that writes it and the one that reads it, and at no time is there
more than one of them.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from quantlab_kernels.gpu.configs import PanelConfig
from quantlab_kernels.gpu.decode import load_table, load_words, weights, window
from quantlab_kernels.gpu.weight import Kind

PANEL_BYTES = 32 << 20


@triton.jit(do_not_specialize=["magic", "first_row"])
def dequantize(
    words_ptr, scales_ptr, zeros_ptr, table_ptr, powers_ptr, panel_ptr,
    columns, out_features, quads, groups, first_row, magic, factor,
    BITS: tl.constexpr, WIDTH: tl.constexpr, LANE: tl.constexpr, WORDS: tl.constexpr, PARTS: tl.constexpr,
    PLANES: tl.constexpr, WINDOWS: tl.constexpr, DECODE: tl.constexpr, OFFSET: tl.constexpr, ASM: tl.constexpr,
    UNIT_LANES: tl.constexpr, GROUP_UNITS: tl.constexpr, ZEROS: tl.constexpr,
    BN: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Rows of the weight from ``first_row`` on, in the dtype of ``panel_ptr``: ``[rows, columns]``.

    Decoded as the GEMM does it, with a power of two taken out of each row; the power is applied last, which is exact as
    long as the dtype has room for the result.

    Args:
        words_ptr: int32 ``[out_features, WORDS, lanes]``; the others as in :func:`quantlab_kernels.gpu.gemm.gemm`.
    """
    DTYPE: tl.constexpr = panel_ptr.dtype.element_ty
    PAIRS: tl.constexpr = 16 // WIDTH
    lanes = quads * 4
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    own = tl.minimum(first_row + row, out_features - 1)
    lane = tl.program_id(1) * BL + tl.arange(0, BL)
    live = (first_row + row < out_features)[:, None]
    table = load_table(table_ptr, magic, DECODE, ASM)
    words = load_words(
        words_ptr + own.to(tl.int64)[:, None] * (WORDS * lanes) + lane[None, :], (lane < lanes)[None, :], lanes, WORDS
    )
    power = tl.load(powers_ptr + out_features + own)[:, None]
    down = tl.load(powers_ptr + own)[:, None]
    group = lane * 0
    if GROUP_UNITS:
        group = tl.minimum(lane // (UNIT_LANES * GROUP_UNITS), groups - 1)
    at = own[:, None] * groups + group[None, :]
    scale = (tl.load(scales_ptr + at).to(tl.float32) * down * factor).to(DTYPE)
    zero = 0.0
    if ZEROS:
        zero = (tl.load(zeros_ptr + at).to(tl.float32) / factor).to(DTYPE)
    element = tl.program_id(1) * (2 * BL) + tl.arange(0, 2 * BL)
    start = element // (2 * UNIT_LANES) * (UNIT_LANES * LANE) + element % (2 * UNIT_LANES)
    own_panel = panel_ptr + row.to(tl.int64)[:, None] * columns
    for w in tl.static_range(WINDOWS):
        decoded = weights(
            window(words, w, PARTS, PLANES), scale, zero, table, magic,
            DTYPE, DECODE, BITS, WIDTH, OFFSET, ZEROS, True, ASM,
        )  # fmt: skip
        for j in tl.static_range(PAIRS):
            column = start + (w * PAIRS + j) * (2 * UNIT_LANES)
            weight = tl.reshape(tl.join(decoded[2 * j], decoded[2 * j + 1]), [BN, 2 * BL])
            weight = (weight.to(tl.float32) * power).to(DTYPE)
            tl.store(own_panel + column[None, :], weight, mask=live & (column < columns)[None, :])


def panel_constants(kind: Kind, config: PanelConfig, asm: bool) -> dict[str, Any]:
    """The ``tl.constexpr`` arguments of :func:`dequantize`."""
    return kind.constants() | {"ASM": asm, "BN": config.block_rows, "BL": config.block_lanes}
