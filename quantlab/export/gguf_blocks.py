"""GGUF's blocks to the bit: numbers of each kind in, bytes out. Layouts: ``ggml-common.h`` of llama.cpp.

Codes are unsigned, ``[blocks, 32]`` or, for the K types, ``[blocks, 256]``; every function returns uint8
``[blocks, bytes of a block]``. What a block's bytes mean is at each function: d and m are float16.
"""

from __future__ import annotations

import torch

SUPER = 256


def q4_0(codes: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """``d * (code - 8)``, 32 codes of 4 bits."""
    return torch.cat([_half(d), _nibbles(codes)], dim=1)


def q4_1(codes: torch.Tensor, d: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """``d * code + m``, 32 codes of 4 bits."""
    return torch.cat([_half(d), _half(m), _nibbles(codes)], dim=1)


def q5_0(codes: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """``d * (code - 16)``, 32 codes of 5 bits."""
    return torch.cat([_half(d), _bits(codes >> 4), _nibbles(codes & 15)], dim=1)


def q5_1(codes: torch.Tensor, d: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """``d * code + m``, 32 codes of 5 bits."""
    return torch.cat([_half(d), _half(m), _bits(codes >> 4), _nibbles(codes & 15)], dim=1)


def q8_0(integers: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """``d * integer``, 32 signed bytes."""
    return torch.cat([_half(d), integers.to(torch.int8).view(torch.uint8)], dim=1)


def mxfp4(patterns: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """E2M1 bit patterns (sign, then the rank of the magnitude) times ``2^(exponent - 127)``, 32 of them."""
    return torch.cat([exponents.view(-1, 1).to(torch.uint8), _nibbles(patterns)], dim=1)


def q2_k(
    codes: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor, d: torch.Tensor, dmin: torch.Tensor
) -> torch.Tensor:
    """``d * scale * code - dmin * min``, codes of 2 bits, scales and mins ``[blocks, 16]`` of 4 bits."""
    return torch.cat([_bytes(scales | mins << 4), _crumbs(codes), _half(d), _half(dmin)], dim=1)


def q3_k(codes: torch.Tensor, scales: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """``d * scale * (code - 4)``, codes of 3 bits, scales ``[blocks, 16]`` in -32 .. 31."""
    lifted = scales + 32
    low = (lifted[:, :8] & 15) | (lifted[:, 8:] & 15) << 4
    high = lifted.view(-1, 4, 4) >> 4
    high = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    return torch.cat([_planes(codes >> 2), _crumbs(codes & 3), _bytes(low), _bytes(high), _half(d)], dim=1)


def q4_k(
    codes: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor, d: torch.Tensor, dmin: torch.Tensor
) -> torch.Tensor:
    """``d * scale * code - dmin * min``, codes of 4 bits, scales and mins ``[blocks, 8]`` of 6 bits."""
    return torch.cat([_half(d), _half(dmin), _six_bits(scales, mins), _pairs(codes)], dim=1)


def q5_k(
    codes: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor, d: torch.Tensor, dmin: torch.Tensor
) -> torch.Tensor:
    """As :func:`q4_k`, codes of 5 bits."""
    parts = [_half(d), _half(dmin), _six_bits(scales, mins), _planes(codes >> 4), _pairs(codes & 15)]
    return torch.cat(parts, dim=1)


def q6_k(codes: torch.Tensor, scales: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """``d * scale * (code - 32)``, codes of 6 bits, scales ``[blocks, 16]`` in -128 .. 127."""
    halves = codes.view(-1, 2, 4, 32)  # four runs of 32 in each half
    low = halves[:, :, :2] & 15 | (halves[:, :, 2:] & 15) << 4
    top = halves >> 4
    high = top[:, :, 0] | top[:, :, 1] << 2 | top[:, :, 2] << 4 | top[:, :, 3] << 6
    signed = scales.to(torch.int8).view(torch.uint8)
    return torch.cat([_bytes(low.flatten(1)), _bytes(high.flatten(1)), signed, _half(d)], dim=1)


def _half(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float16).view(-1, 1).contiguous().view(torch.uint8)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.uint8)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Element i of 32 in the low half of byte i, element i + 16 in the high half."""
    return _bytes(codes[:, :16] | codes[:, 16:] << 4)


def _pairs(codes: torch.Tensor) -> torch.Tensor:
    """Of each 64 elements the first 32 in low halves, the others in the high halves of the same bytes."""
    runs = codes.view(-1, 4, 2, 32)
    return _bytes((runs[:, :, 0] | runs[:, :, 1] << 4).flatten(1))


def _crumbs(codes: torch.Tensor) -> torch.Tensor:
    """Of each 128 elements four runs of 32 in the four bit pairs of the same 32 bytes."""
    runs = codes.view(-1, 2, 4, 32)
    return _bytes((runs[:, :, 0] | runs[:, :, 1] << 2 | runs[:, :, 2] << 4 | runs[:, :, 3] << 6).flatten(1))


def _planes(bits: torch.Tensor) -> torch.Tensor:
    """One bit of 256 elements: run k of 32 in bit k of 32 bytes."""
    runs = bits.view(-1, 8, 32).to(torch.int32)
    return _bytes((runs << torch.arange(8)[:, None]).sum(1))


def _bits(bits: torch.Tensor) -> torch.Tensor:
    """One bit of 32 elements, in order: 4 bytes."""
    return _bytes((bits.view(-1, 4, 8).to(torch.int32) << torch.arange(8)).sum(-1))


def _six_bits(scales: torch.Tensor, mins: torch.Tensor) -> torch.Tensor:
    """Eight scales and eight mins of 6 bits in 12 bytes: the first four whole, of the others four bits and two."""
    low_s, high_s, low_m, high_m = scales[:, :4], scales[:, 4:], mins[:, :4], mins[:, 4:]
    first = low_s | (high_s >> 4) << 6
    second = low_m | (high_m >> 4) << 6
    third = (high_s & 15) | (high_m & 15) << 4
    return _bytes(torch.cat([first, second, third], dim=1))
