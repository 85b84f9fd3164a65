"""Codes to bits and back: the one layout that checkpoints store and kernels read.

A row of codes is one dense little-endian bit stream: code ``k`` occupies the bits ``k*b .. k*b + b - 1``,
and a row is padded with zero bits to a whole byte. Widths that do not divide a byte straddle its border, so
nothing is wasted: ``b`` bits a code for every ``b`` from 1 to 8.
"""

from __future__ import annotations

import torch

# Eight codes of b bits fill exactly b bytes: the unit in which rows are packed and unpacked.
_UNIT = 8


def packed_width(columns: int, bits: int) -> int:
    """Bytes that a row of ``columns`` codes takes."""
    return (columns * bits + 7) // 8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes densely along the last dimension.

    Args:
        codes: integers in ``[0, 2**bits)``, shape ``[..., columns]``.
        bits: the width of a code, 1 to 8.

    Returns:
        uint8 ``[..., packed_width(columns, bits)]``.

    Raises:
        ValueError: the width is not 1..8, or a code does not fit in it.
    """
    _check_width(bits)
    if codes.numel() and (int(codes.max()) >> bits or int(codes.min()) < 0):
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit in {bits} bits")
    if bits == 8:
        return codes.to(torch.uint8)
    columns = codes.shape[-1]
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -columns % _UNIT))
    units = padded.unflatten(-1, (-1, _UNIT))
    words = torch.zeros(units.shape[:-1], dtype=torch.int64, device=codes.device)
    for k in range(_UNIT):
        words |= units[..., k].to(torch.int64) << (k * bits)
    packed = torch.stack([(words >> (8 * j)) & 0xFF for j in range(bits)], dim=-1).to(torch.uint8)
    return packed.flatten(-2)[..., : packed_width(columns, bits)].contiguous()


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Undo :func:`pack`.

    Args:
        packed: uint8 ``[..., packed_width(columns, bits)]``.
        bits: the width of a code, 1 to 8.
        columns: how many codes a row holds.

    Returns:
        uint8 ``[..., columns]``.

    Raises:
        ValueError: the width is not 1..8, or the rows are not as long as ``columns`` codes need.
    """
    _check_width(bits)
    width = packed_width(columns, bits)
    if packed.shape[-1] != width:
        raise ValueError(f"{columns} codes of {bits} bits take {width} bytes a row, not {packed.shape[-1]}")
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    if _UNIT % bits == 0:  # no code straddles a byte: eight bits at a time are enough
        shifts = range(0, 8, bits)
        codes = torch.stack([(packed >> shift) & mask for shift in shifts], dim=-1)
        return codes.flatten(-2)[..., :columns]
    padded = torch.nn.functional.pad(packed, (0, -width % bits))
    units = padded.unflatten(-1, (-1, bits))
    words = torch.zeros(units.shape[:-1], dtype=torch.int64, device=packed.device)
    for j in range(bits):
        words |= units[..., j].to(torch.int64) << (8 * j)
    codes = torch.stack([((words >> (k * bits)) & mask).to(torch.uint8) for k in range(_UNIT)], dim=-1)
    return codes.flatten(-2)[..., :columns]


def _check_width(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"a code has 1 to 8 bits, not {bits}")
