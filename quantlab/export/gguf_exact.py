"""A layer's own codes in GGUF's blocks, where there are blocks of their grid: nothing is rounded."""

from __future__ import annotations

import torch

from quantlab.export import gguf_blocks as blocks
from quantlab.export.base import CannotHoldError, integers_of, same_in, sign_and_magnitude
from quantlab.numerics import Grid, QTensor, decode_scales


def exact_blocks(qtensor: QTensor) -> tuple[torch.Tensor, str]:
    """A layer's own codes as blocks of the smallest type that holds them: uint8 ``[rows, bytes]``, and the type.

    Raises:
        CannotHoldError: no type does.
    """
    rows, columns = qtensor.shape
    size = columns // qtensor.scales.shape[1]
    if qtensor.low_rank is not None:
        raise CannotHoldError("it has a low-rank correction")
    if columns % 32 or (size % 32):
        what = f"scales for groups of {size}" if columns % 32 == 0 else f"rows of {columns}"
        raise CannotHoldError(f"{what}, and blocks have 32 weights")
    if qtensor.grid.name == "e2m1" and qtensor.scales.dtype == torch.float8_e8m0fnu and qtensor.zeros is None:
        patterns = sign_and_magnitude(qtensor.grid)[qtensor.codes.int()].view(-1, 32)
        data = blocks.mxfp4(patterns, _spread(qtensor.scales.view(torch.uint8), rows, columns, 32))
        return data.view(rows, -1), "mxfp4"
    table, factor = _whole(qtensor.grid)
    scales = decode_scales(qtensor.scales, qtensor.outer) / factor
    if not same_in(scales, torch.float16):
        raise CannotHoldError(f"its scales ({qtensor.scales.dtype}) are no float16 numbers, which blocks have")
    if qtensor.zeros is not None:
        return _asymmetric(qtensor, scales)
    values = table[qtensor.codes.int()]
    lowest, highest = int(table.min()), int(table.max())
    if columns % blocks.SUPER == 0 and (size % blocks.SUPER == 0):
        made = _in_super_blocks(values, _spread(scales, rows, columns, blocks.SUPER), lowest, highest)
        if made is not None:
            return made[0].view(rows, -1), made[1]
    data, kind = _in_blocks(values.view(-1, 32), _spread(scales, rows, columns, 32), lowest, highest)
    return data.view(rows, -1), kind


def _asymmetric(qtensor: QTensor, scales: torch.Tensor) -> tuple[torch.Tensor, str]:
    """``(q - z) * s``: a minimum ``(lowest - z) * s`` where float16 has it, else the differences themselves."""
    rows, columns = qtensor.shape
    integers, zeros = integers_of(qtensor), qtensor.zeros
    assert zeros is not None
    if integers is None or zeros.is_floating_point():
        raise CannotHoldError("its zeros are not whole")
    lowest, bits = int(qtensor.grid.lowest), qtensor.grid.bits
    minimum = scales * (lowest - zeros.float())
    if bits in (4, 5) and same_in(minimum, torch.float16):
        pack = blocks.q4_1 if bits == 4 else blocks.q5_1
        codes = (integers - lowest).view(-1, 32)
        d, m = _spread(scales, rows, columns, 32), _spread(minimum, rows, columns, 32)
        return pack(codes, d, m).view(rows, -1), f"q{bits}_1"
    groups = scales.shape[1]
    values = (integers.view(rows, groups, -1) - zeros.to(torch.int16).unsqueeze(-1)).view(-1, 32)
    low, high = int(values.min()), int(values.max())
    data, kind = _in_blocks(values, _spread(scales, rows, columns, 32), low, high)
    return data.view(rows, -1), kind


def _in_blocks(values: torch.Tensor, d: torch.Tensor, lowest: int, highest: int) -> tuple[torch.Tensor, str]:
    """Whole numbers ``[blocks, 32]`` under their scales in the smallest symmetric block that holds them."""
    if lowest >= -8 and highest <= 7:
        return blocks.q4_0(values + 8, d), "q4_0"
    if lowest >= -16 and highest <= 15:
        return blocks.q5_0(values + 16, d), "q5_0"
    if lowest >= -128 and highest <= 127:
        return blocks.q8_0(values, d), "q8_0"
    raise CannotHoldError(f"its values reach from {lowest} to {highest} steps, more than a block of 8 bits has")


def _in_super_blocks(
    values: torch.Tensor, d: torch.Tensor, lowest: int, highest: int
) -> tuple[torch.Tensor, str] | None:
    """The same in blocks of 256 with one scale, where that is smaller than blocks of 32."""
    values = values.reshape(-1, blocks.SUPER)
    ones = torch.ones(len(values), 16, dtype=torch.int16)
    if lowest >= -2 and highest <= 1 and same_in(2 * d, torch.float16):
        return blocks.q2_k(values + 2, ones, ones, d, 2 * d), "q2_k"
    if lowest >= -4 and highest <= 3:
        return blocks.q3_k(values + 4, ones, d), "q3_k"
    if -32 <= lowest < -16 and highest <= 31:
        return blocks.q6_k(values + 32, ones, d), "q6_k"
    return None


def _whole(grid: Grid) -> tuple[torch.Tensor, int]:
    """A grid's values as whole multiples of ``1 / factor``: int16 in code order, and the factor.

    Raises:
        CannotHoldError: they are none.
    """
    for factor in (1, 2, 4, 8, 16):
        scaled = grid.values * factor
        if torch.equal(scaled, scaled.round()) and float(scaled.abs().max()) <= 128:
            return scaled.to(torch.int16), factor
    raise CannotHoldError(f"the values of {grid.name} are no whole multiples of a step, which blocks have")


def _spread(scales: torch.Tensor, rows: int, columns: int, size: int) -> torch.Tensor:
    """The scale of each block of ``size``, in order: ``[blocks]``."""
    count = columns // size
    return scales.expand(rows, -1).repeat_interleave(count // scales.shape[1], dim=1).flatten()
