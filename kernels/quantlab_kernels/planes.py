"""Six-bit floats as hardware likes them: native bit patterns, 4+2 bit planes, and the bias-shift decode to float16.

A table's codes ascend with its values; a minifloat's own pattern is a sign, an exponent and a mantissa, in this order
from the highest bit. Patterns of 6 bits are stored as two planes, so that every load is aligned: 2 bits (the sign and
the high bit of the exponent) and 4 bits (the rest), as in FP6-LLM (arXiv:2401.14112). Each plane is a dense
little-endian stream, see :mod:`quantlab_kernels.packing`.
"""

from __future__ import annotations

import torch

from quantlab_kernels.packing import pack, unpack

_HALF_EXPONENT, _HALF_MANTISSA, _HALF_BIAS = 5, 10, 15


def to_patterns(codes: torch.Tensor, exponent: int, mantissa: int, table_size: int | None = None) -> torch.Tensor:
    """Native patterns of codes that ascend with their values. Zero becomes the positive zero.

    Args:
        codes: uint8, any shape.
        exponent: bits of the exponent.
        mantissa: bits of the mantissa.
        table_size: how many values there are, where not every pattern is a number (E4M3, E5M2).

    Returns:
        uint8 of the same shape, in the lowest ``1 + exponent + mantissa`` bits.
    """
    sign = 1 << (exponent + mantissa)
    zero = (table_size or 2 * sign - 1) // 2
    away = codes.int() - zero
    return torch.where(away < 0, sign - away, away).to(torch.uint8)


def from_patterns(patterns: torch.Tensor, exponent: int, mantissa: int, table_size: int | None = None) -> torch.Tensor:
    """Undo :func:`to_patterns`; the two zeros have one code."""
    sign = 1 << (exponent + mantissa)
    zero = (table_size or 2 * sign - 1) // 2
    magnitude = (patterns & (sign - 1)).int()
    return (zero + torch.where(patterns >= sign, -magnitude, magnitude)).to(torch.uint8)


def pack_planes(patterns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Patterns of 6 bits ``[..., columns]`` as the 2-bit plane and the 4-bit plane.

    Returns:
        ``(high, low)``: uint8 ``[..., ceil(columns / 4)]`` and ``[..., ceil(columns / 2)]``.

    Raises:
        ValueError: a pattern does not fit in 6 bits.
    """
    if patterns.numel() and int(patterns.max()) > 0x3F:
        raise ValueError(f"pattern {int(patterns.max())} does not fit in 6 bits")
    return pack(patterns >> 4, 2), pack(patterns & 0xF, 4)


def unpack_planes(high: torch.Tensor, low: torch.Tensor, columns: int) -> torch.Tensor:
    """Undo :func:`pack_planes`: uint8 ``[..., columns]``."""
    return (unpack(high, 2, columns) << 4) | unpack(low, 4, columns)


def decode_half(patterns: torch.Tensor, exponent: int, mantissa: int) -> torch.Tensor:
    """What native patterns mean, as float16, exactly: bits moved to their places and one multiplication.

    The exponent is not re-biased, which would need another rule for subnormals: the bits are read as a float16 as they
    stand, and ``2^(15 - bias)`` makes up for the difference of the biases. It must not flush subnormals to zero.

    Args:
        patterns: uint8, any shape.
        exponent: bits of the exponent, 1 to 5.
        mantissa: bits of the mantissa, at most ``7 - exponent``.

    Raises:
        ValueError: float16 has no room for such numbers.
    """
    if not 1 <= exponent <= _HALF_EXPONENT or exponent + mantissa > 7:
        raise ValueError(f"e{exponent}m{mantissa}: float16 holds up to 5 bits of exponent, a pattern up to 8 in all")
    bias = (1 << (exponent - 1)) - 1
    sign = 1 << (exponent + mantissa)
    wide = patterns.to(torch.int32)
    magnitude = (wide & (sign - 1)) << (_HALF_MANTISSA - mantissa)
    bits = magnitude | ((wide & sign) << (_HALF_EXPONENT + _HALF_MANTISSA - exponent - mantissa))
    # int16 holds the sign bit as its own.
    half = torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16).view(torch.float16)
    return half * torch.tensor(2.0 ** (_HALF_BIAS - bias), dtype=torch.float16, device=patterns.device)
