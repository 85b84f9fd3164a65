"""Codes to bits and back: the one layout that checkpoints store and kernels read.

A row of codes is one dense little-endian bit stream: code ``k`` occupies the bits ``k*b .. k*b + b - 1``,
and a row is padded with zero bits to a whole byte. Widths that do not divide a byte straddle its border, so
nothing is wasted: ``b`` bits a code for every ``b`` from 1 to 8.
"""

from __future__ import annotations

import torch

from quantlab_kernels import quantizing

# Eight codes of b bits fill exactly b bytes: the unit in which rows are packed and unpacked.
_UNIT = 8
# Codes that are packed at once: what lies between two steps stays in the cache.
_CHUNK = 1 << 18


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
    if codes.numel() and (int(codes.max()) >> bits or (codes.dtype != torch.uint8 and int(codes.min()) < 0)):
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit in {bits} bits")
    codes = codes.to(torch.uint8).contiguous()
    if bits == 8:
        return codes
    columns = codes.shape[-1]
    width = packed_width(columns, bits)
    if not codes.numel():
        return codes.new_empty(*codes.shape[:-1], width)
    if (found := quantizing.packed(codes, bits, width)) is not None:
        return found
    packed = codes.new_empty(*codes.shape[:-1], width)
    step = max(1, _CHUNK // columns)
    parts = codes.view(-1, columns).split(step), packed.view(-1, packed.shape[-1]).split(step)
    for some, out in zip(*parts, strict=True):
        padded = torch.nn.functional.pad(some, (0, -columns % _UNIT))
        out.copy_(_pack_units(padded, bits)[:, : out.shape[1]])
    return packed


def _pack_units(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes ``[rows, units * bits]`` of whole units of codes: neighbours are pushed together in pairs, three times."""
    words, width, word = codes, bits, 8
    for dtype in (torch.int16, torch.int32, torch.int64):
        words = words.view(dtype)  # two words side by side: the first in the lower half
        words = (words & ((1 << width) - 1)) | ((words >> word) << width)
        width, word = 2 * width, 2 * word
    return words.view(torch.uint8).unflatten(1, (-1, _UNIT))[..., :bits].flatten(1)


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
