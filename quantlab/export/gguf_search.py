"""Weights to GGUF's blocks: scales (and minimums) searched for the smallest error, as far as inputs make it count.

Symmetric blocks take the searched full-range scales that quantlab's own formats take. Where a block has a minimum, the
range is tried at several widths, and the codes' own least-squares scale and minimum follow, as in llama.cpp's
``make_qkx`` family. K types have scales of two levels: those of the sub-blocks are found first, rounded to the few bits
that they get under the block's float16, and the codes chosen anew for what they became.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quantlab.export import gguf_blocks as blocks
from quantlab.export.base import sign_and_magnitude
from quantlab.numerics import apply_scales, choose_scales, grid

# Widths of the range that are tried, as parts of max - min.
_WIDTHS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 1.05)
_CHUNK = 1 << 20  # weights at once


def quantized_blocks(weight: torch.Tensor, kind: str, importance: torch.Tensor | None = None) -> torch.Tensor:
    """A weight as rows of blocks.

    Args:
        weight: ``[rows, columns]``; a row is whole blocks (32 columns, K types 256).
        kind: a name of :data:`TYPES`.
        importance: ``[columns]``, the second moment of each input; None counts all alike.

    Returns:
        uint8 ``[rows, bytes]``.
    """
    encode, _ = TYPES[kind]
    rows, columns = weight.shape
    step = max(1, _CHUNK // columns)
    importance = None if importance is None else importance.float().clamp(min=1e-12 * float(importance.max()) + 1e-30)
    parts = []
    for start in range(0, rows, step):
        part = weight[start : start + step].float()
        parts.append(encode(part, importance).view(len(part), -1))
    return torch.cat(parts)


def _symmetric(bits: int, pack: Callable[..., torch.Tensor], offset: int) -> Callable[..., torch.Tensor]:
    def encode(weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        table = grid(f"int{bits}")
        scales = choose_scales(weight, table, 32, importance=importance, stored="float16")
        codes = apply_scales(weight, table, scales).view(-1, 32).to(torch.int16) + (int(table.lowest) + offset)
        return pack(codes, scales.scales.flatten())

    return encode


def _mxfp4(weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    table = grid("e2m1")
    scales = choose_scales(weight, table, 32, importance=importance, stored="e8m0")
    patterns = sign_and_magnitude(table)[apply_scales(weight, table, scales).int()]
    return blocks.mxfp4(patterns.view(-1, 32), scales.scales.flatten().view(torch.uint8))


def _affine(bits: int, pack: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def encode(weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        groups, counted = _groups(weight, importance, 32)
        scale, low = affine_range(groups, counted, bits, below_zero=False)
        scale, low = scale.half().float(), low.half().float()
        return pack(_codes(groups, scale, low, bits).to(torch.int16), scale, low)

    return encode


def _k_affine(bits: int, size: int, level: int, pack: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """K types whose sub-blocks have a scale and a minimum, both of ``level`` steps at most."""

    def encode(weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        groups, counted = _groups(weight, importance, size)
        scale, low = affine_range(groups, counted, bits, below_zero=True)
        count = blocks.SUPER // size
        scale, minimum = scale.view(-1, count), -low.view(-1, count)
        d, scales = _levels(scale, level)
        dmin, mins = _levels(minimum, level)
        found = (d[:, None] * scales).flatten(), -(dmin[:, None] * mins).flatten()
        codes = _codes(groups, *found, bits).view(-1, blocks.SUPER).to(torch.int16)
        return pack(codes, scales.to(torch.int16), mins.to(torch.int16), d, dmin)

    return encode


def _k_symmetric(bits: int, lowest: int, pack: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """K types whose sub-blocks of 16 have a signed scale in ``lowest .. -lowest - 1``."""

    def encode(weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        table = grid(f"int{bits}")
        found = choose_scales(weight, table, 16, importance=importance).scales.view(-1, blocks.SUPER // 16)
        found = torch.where(weight.view(-1, blocks.SUPER // 16, 16).any(-1), found, 0)
        extreme = found.gather(1, found.abs().argmax(1, keepdim=True)).squeeze(1)
        d = (extreme / lowest).half().float()
        d = torch.where(d == 0, 1.0, d)
        scales = (found / d[:, None]).round().clamp(lowest, -lowest - 1)
        step = (d[:, None] * scales).view(-1, 1)
        scaled = torch.where(step == 0, 0, weight.view(-1, 16) / torch.where(step == 0, 1, step))
        codes = table.round(scaled).view(-1, blocks.SUPER).to(torch.int16) - int(table.lowest)
        return pack(codes, scales.to(torch.int16), d)

    return encode


def affine_range(
    groups: torch.Tensor, importance: torch.Tensor | None, bits: int, *, below_zero: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and lowest value of each group: ``weight = scale * code + low`` with codes from 0.

    Args:
        groups: ``[groups, size]``.
        importance: like ``groups``, or None.
        bits: of a code.
        below_zero: whether the lowest value must not lie above 0, as K types have it.

    Returns:
        Two tensors ``[groups]``; scales are not negative.
    """
    counted = torch.ones_like(groups) if importance is None else importance
    levels = 2**bits - 1
    low, high = groups.amin(1), groups.amax(1)
    if below_zero:
        low = low.clamp(max=0)
    span = high - low
    best = (span / levels, low)
    least = _error(groups, counted, *best, bits)
    total, first = counted.sum(1), (counted * groups).sum(1)
    for width in _WIDTHS:
        scale, offset = span * width / levels, low + span * (1 - width) / 2
        if below_zero:
            offset = offset.clamp(max=0)
        for _ in range(2):
            codes = _codes(groups, scale, offset, bits)
            mean, square = (counted * codes).sum(1), (counted * codes * codes).sum(1)
            product = (counted * codes * groups).sum(1)
            determinant = total * square - mean * mean
            sound = determinant > 0
            divisor = torch.where(sound, determinant, 1)
            scale = torch.where(sound, (total * product - mean * first) / divisor, scale)
            offset = torch.where(sound, (square * first - mean * product) / divisor, offset)
            if below_zero:  # with a minimum of 0 the scale alone is fitted
                above = offset > 0
                alone = torch.where(square > 0, product / torch.where(square > 0, square, 1), scale)
                scale, offset = torch.where(above, alone, scale), offset.clamp(max=0)
            error = _error(groups, counted, scale, offset, bits)
            better = (error < least) & (scale >= 0)
            least = torch.where(better, error, least)
            best = (torch.where(better, scale, best[0]), torch.where(better, offset, best[1]))
    return best


def _codes(groups: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, bits: int) -> torch.Tensor:
    inverse = torch.where(scale == 0, 0, 1 / torch.where(scale == 0, 1, scale))
    return ((groups - low[:, None]) * inverse[:, None]).round().clamp(0, 2**bits - 1)


def _error(
    groups: torch.Tensor, counted: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, bits: int
) -> torch.Tensor:
    off = _codes(groups, scale, low, bits) * scale[:, None] + low[:, None] - groups
    return (counted * off * off).sum(1)


def _levels(values: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers ``[blocks, count]``, not negative, as a float16 of each block times integers up to ``level``."""
    d = (values.amax(1) / level).half().float()
    inverse = torch.where(d == 0, 0, 1 / torch.where(d == 0, 1, d))
    return d, (values * inverse[:, None]).round().clamp(0, level)


def _groups(
    weight: torch.Tensor, importance: torch.Tensor | None, size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    counted = None if importance is None else importance.expand_as(weight).reshape(-1, size)
    return weight.reshape(-1, size), counted


TYPES: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor], int]] = {
    "q4_0": (_symmetric(4, blocks.q4_0, 8), 32),
    "q4_1": (_affine(4, blocks.q4_1), 32),
    "q5_0": (_symmetric(5, blocks.q5_0, 16), 32),
    "q5_1": (_affine(5, blocks.q5_1), 32),
    "q8_0": (_symmetric(8, blocks.q8_0, 0), 32),
    "mxfp4": (_mxfp4, 32),
    "q2_k": (_k_affine(2, 16, 15, blocks.q2_k), blocks.SUPER),
    "q3_k": (_k_symmetric(3, -32, blocks.q3_k), blocks.SUPER),
    "q4_k": (_k_affine(4, 32, 63, blocks.q4_k), blocks.SUPER),
    "q5_k": (_k_affine(5, 32, 63, blocks.q5_k), blocks.SUPER),
    "q6_k": (_k_symmetric(6, -128, blocks.q6_k), blocks.SUPER),
}
"""How a weight becomes blocks of each kind, and how many columns a block has."""
