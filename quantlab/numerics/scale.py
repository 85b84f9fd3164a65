"""How scales are chosen and stored: granularity, abs-max and search, symmetric and asymmetric."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from quantlab_kernels import quantizing

from quantlab.numerics.grid import Grid
from quantlab.numerics.scale_type import OuterScales, ScaleType, decode_scales, scale_type
from quantlab.numerics.search import asymmetric_scales, compiled_symmetric_scales, symmetric_scales

Granularity = int | str  # a group size along the inputs, "channel" or "tensor"

# Elements that are searched at once: enough to hide the cost of a call, few enough to stay in the cache.
_CHUNK = 1 << 17
# The same on other devices, where a call costs more and there is no such cache.
_CHUNK_ELSEWHERE = 1 << 24


class Scales(NamedTuple):
    """What turns grid values into weights: ``(value - zero) * scale``.

    Attributes:
        scales: ``[out, groups]``, ``[out, 1]`` or ``[1, 1]``, as stored.
        zeros: of the same shape, in units of the grid, or None (symmetric).
        outer: the second level of the scales, or None.
    """

    scales: torch.Tensor
    zeros: torch.Tensor | None
    outer: OuterScales | None = None

    def decode(self) -> torch.Tensor:
        """The scales as the float32 numbers that they mean."""
        return decode_scales(self.scales, self.outer)


def group_view(weight: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """The weight ``[out, in]`` as ``[rows, groups, size]``: one scale for each of ``rows x groups``."""
    if granularity == "tensor":
        return weight.reshape(1, 1, -1)
    if granularity == "channel":
        return weight.unsqueeze(1)
    return weight.unflatten(1, (-1, int(granularity)))


def choose_scales(
    weight: torch.Tensor,
    grid: Grid,
    granularity: Granularity,
    *,
    symmetric: bool = True,
    search: bool = True,
    importance: torch.Tensor | None = None,
    stored: str = "float32",
) -> Scales:
    """Scales, and zeros where asymmetric, for a weight ``[out, in]``.

    Args:
        weight: ``[out, in]``, floating-point; what is computed of it is float32.
        grid: what codes mean.
        granularity: a group size that divides ``in``, ``"channel"`` or ``"tensor"``.
        symmetric: no zero; the scale carries a sign where its type and a lopsided grid let it.
        search: minimize ``sum importance * error^2`` a group over a range of scales, each with the codes' own
            least-squares scale; otherwise the abs-max (or min-max) scale.
        importance: ``[in]``, the second moment of each input ``E[x_j^2]``; None counts all inputs alike.
        stored: how scales are stored, see :func:`scale_type`; the returned scales are.

    Returns:
        Scales and zeros, each ``[out, groups]``, ``[out, 1]`` or ``[1, 1]``; zeros are None if symmetric, int8 for
        integer grids and floating-point for others.

    Source: algorithms of llama.cpp's ``make_qx_quants`` family, full-range form as in AutoRound's opt-RTN.
    """
    kind = scale_type(stored)
    groups = group_view(weight, granularity)
    weights = None if importance is None else group_view(importance.expand_as(weight), granularity)
    chosen, zeros = _plain_scales(groups, grid, symmetric, search, weights, kind.signed)
    if not grid.has_zero:  # then a group of zeros is as small as its scale
        chosen = torch.where(chosen == 0, torch.finfo(torch.float32).tiny, chosen)
    outer = kind.outer(chosen)
    if kind.is_coarse:
        candidates = _candidates(groups, grid, chosen, zeros, kind, outer, search)
        return Scales(*_best_stored(groups, grid, candidates, outer, weights), outer)
    encoded = kind.encode(chosen, outer)
    if zeros is not None:
        zeros = _zeros_for(grid, chosen, zeros, decode_scales(encoded, outer)).to(zero_dtype(grid, kind))
    return Scales(encoded, zeros, outer)


def _plain_scales(
    groups: torch.Tensor, grid: Grid, symmetric: bool, search: bool, weights: torch.Tensor | None, signed: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zeros ``[rows, groups]`` in float32, before they are stored; weights are what squared errors count."""
    if symmetric and (found := compiled_symmetric_scales(groups, grid, search, weights, signed)) is not None:
        return found, None
    chosen = torch.empty(groups.shape[:2], device=groups.device)
    zeros = None if symmetric else torch.empty_like(chosen)
    for rows in _chunks(groups):
        own, part = groups[rows].float(), None if weights is None else weights[rows]
        if zeros is None:
            chosen[rows] = symmetric_scales(own, grid, search, part, signed)
        else:
            chosen[rows], zeros[rows] = asymmetric_scales(own, grid, search, part)
    return chosen, zeros


def apply_scales(weight: torch.Tensor, grid: Grid, scales: Scales) -> torch.Tensor:
    """Codes uint8 ``[out, in]`` of the entries nearest to ``weight / scale + zero``, for a weight of any dtype."""
    groups = weight.unflatten(1, (scales.scales.shape[1], -1))
    steps, zeros = scales.decode(), scales.zeros
    if (found := quantizing.nearest_codes(groups, steps, zeros, grid.values, grid.borders)) is not None:
        return found.flatten(1)
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
    for rows in _chunks(groups):
        own = rows if len(steps) > 1 else slice(None)  # one for the whole tensor is every row's
        scaled = groups[rows].float() / steps[own].unsqueeze(-1)
        if zeros is not None:
            scaled += zeros[own].float().unsqueeze(-1)
        codes[rows] = grid.nearest(scaled)
    return codes.flatten(1)


def zero_dtype(grid: Grid | None, kind: ScaleType) -> torch.dtype:
    """How zeros are stored, for a grid (None: one that is fitted, which has no integers) and a way to store scales."""
    if grid is not None and grid.is_integer:
        return torch.int8
    return kind.dtype if kind.dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.bfloat16


def _zeros_for(grid: Grid, chosen: torch.Tensor, zeros: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Zeros that keep the middle of each group's range where it was, under the scales as they are stored."""
    middle = (grid.lowest + grid.highest) / 2
    ratio = chosen / stored
    moved = middle - (middle - zeros) * ratio
    # Beyond that the scale did not fit its type at all.
    moved = torch.where((ratio >= 0.5) & (ratio <= 2), moved, zeros)
    return moved.round().clamp(grid.lowest, grid.highest) if grid.is_integer else moved


def _candidates(
    groups: torch.Tensor,
    grid: Grid,
    chosen: torch.Tensor,
    zeros: torch.Tensor | None,
    kind: ScaleType,
    outer: OuterScales | None,
    search: bool,
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """The stored forms of coarse scales that come into question, each with the zeros that go with it."""
    plain = chosen
    if kind.dtype == torch.float8_e8m0fnu:
        plain = _power_of_two(groups, grid) if zeros is None else _power_above(chosen)
    elif search and zeros is None:
        plain, _ = _plain_scales(groups, grid, True, False, None, kind.signed)
    stored = [kind.encode(plain, outer)]
    if search:
        stored = [*kind.neighbours(chosen, outer), *stored]
    if zeros is None:
        return [(scales, None) for scales in stored]
    dtype = zero_dtype(grid, kind)
    return [(scales, _zeros_for(grid, chosen, zeros, decode_scales(scales, outer)).to(dtype)) for scales in stored]


def _power_of_two(groups: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The scale of the Microscaling standard: the largest element's exponent less the grid's largest exponent."""
    exponents = torch.frexp(groups.abs().amax(-1).float()).exponent - torch.frexp(torch.tensor(grid.highest)).exponent
    return torch.where(groups.any(-1), _exp2(exponents), 0)


def _power_above(scales: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that is not below ``scales``, so that a range is covered; 0 stays."""
    mantissa, exponent = torch.frexp(scales)
    return torch.where(scales == 0, 0, _exp2(exponent - (mantissa == 0.5).int()))


def _exp2(exponents: torch.Tensor) -> torch.Tensor:
    return torch.ldexp(torch.ones(exponents.shape, device=exponents.device), exponents.clamp(-127, 127))


def _best_stored(
    groups: torch.Tensor,
    grid: Grid,
    candidates: list[tuple[torch.Tensor, torch.Tensor | None]],
    outer: OuterScales | None,
    weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of several stored forms of each scale, with their zeros, the one that leaves the smallest error; the first of
    equals.
    """
    best, zeros = candidates[0]
    if len(candidates) == 1:
        return best, zeros
    best, zeros = best.view(torch.uint8).clone(), None if zeros is None else zeros.clone()
    least = torch.full(best.shape, torch.inf, device=best.device)
    for scales, shift in candidates:
        step = decode_scales(scales, outer)
        for rows in _chunks(groups):
            scale = step[rows].unsqueeze(-1)
            zero = 0 if shift is None else shift[rows].float().unsqueeze(-1)
            own = groups[rows].float()
            off = grid.round(own / scale + zero).sub_(zero).mul_(scale).sub_(own).square_()
            error = (off if weights is None else off.mul_(weights[rows])).sum(-1)
            better = error < least[rows]
            least[rows] = torch.where(better, error, least[rows])
            best[rows] = torch.where(better, scales.view(torch.uint8)[rows], best[rows])
            if zeros is not None and shift is not None:
                zeros[rows] = torch.where(better, shift[rows], zeros[rows])
    return best.view(candidates[0][0].dtype), zeros


def _chunks(groups: torch.Tensor) -> Iterator[slice]:
    rows = max(1, (_CHUNK if groups.device.type == "cpu" else _CHUNK_ELSEWHERE) // groups[0].numel())
    for start in range(0, len(groups), rows):
        yield slice(start, start + rows)
