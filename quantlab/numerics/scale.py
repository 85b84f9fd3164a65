"""How scales are chosen: granularity, abs-max and search, symmetric and asymmetric.

Symmetric scales are *full-range*: the weight of largest magnitude maps to the grid's extreme. Where a grid is longer on
one side (an integer grid's code -2^(b-1)) they are signed, so that no code is wasted (the "opt-RTN" of llama.cpp and
AutoRound).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from quantlab.numerics.grid import Grid
from quantlab.numerics.scale_type import OuterScales, ScaleType, decode_scales, scale_type

Granularity = int | str  # a group size along the inputs, "channel" or "tensor"

# Steps of the search, as multiples of the abs-max scale's inverse: above 1 clips the largest weights, below 1
# leaves the outermost codes unused. Least-squares refits of the best step then settle between the steps.
_FACTORS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.42, 1.55, 1.7)
_REFITS = 2
# A lopsided grid (int: -8..7) is also tried the other way round, where the extreme weight takes the +7.
_ORIENTATIONS = (1, -1)
# Elements that are searched at once: enough to hide the cost of a call, few enough to stay in the cache.
_CHUNK = 1 << 17


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
        weight: float32 ``[out, in]``.
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
    chosen = torch.empty(groups.shape[:2], device=weight.device)
    zeros = None if symmetric else torch.empty_like(chosen)
    for rows in _chunks(groups):
        part = None if weights is None else weights[rows]
        if zeros is None:
            chosen[rows] = _symmetric(groups[rows], grid, search, part, kind.signed)
        else:
            chosen[rows], zeros[rows] = _asymmetric(groups[rows], grid, search, part)
    if zeros is not None:
        zeros = zeros.to(_zero_dtype(grid, kind))
    outer = kind.outer(chosen)
    if kind.is_coarse and search:
        encoded = _better_neighbour(groups, grid, chosen, zeros, weights, kind, outer)
    elif kind.dtype == torch.float8_e8m0fnu:
        encoded = kind.encode(_power_of_two(groups, grid), outer)
    else:
        encoded = kind.encode(chosen, outer)
    return Scales(encoded, zeros, outer)


def apply_scales(weight: torch.Tensor, grid: Grid, scales: Scales) -> torch.Tensor:
    """Codes uint8 ``[out, in]`` of the entries nearest to ``weight / scale + zero``."""
    groups = weight.unflatten(1, (scales.scales.shape[1], -1))
    scaled = groups / scales.decode().unsqueeze(-1)
    if scales.zeros is not None:
        scaled += scales.zeros.float().unsqueeze(-1)
    return grid.nearest(scaled).flatten(1)


def _zero_dtype(grid: Grid, kind: ScaleType) -> torch.dtype:
    if grid.is_integer:
        return torch.int8
    return kind.dtype if kind.dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.bfloat16


def _power_of_two(groups: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The scale of the Microscaling standard: the largest element's exponent less the grid's largest exponent."""
    exponents = torch.frexp(groups.abs().amax(-1)).exponent - torch.frexp(torch.tensor(grid.highest)).exponent
    return torch.where(groups.any(-1), torch.ldexp(torch.ones(()), exponents.clamp(-126, 127)), 0)


def _better_neighbour(
    groups: torch.Tensor,
    grid: Grid,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    weights: torch.Tensor | None,
    kind: ScaleType,
    outer: OuterScales | None,
) -> torch.Tensor:
    """Of the two stored forms around each scale the one that leaves the smaller error."""
    candidates = kind.neighbours(scales, outer)
    errors = []
    for candidate in candidates:
        step = decode_scales(candidate, outer)
        error = torch.empty_like(step)
        for rows in _chunks(groups):
            scale = step[rows].unsqueeze(-1)
            zero = 0 if zeros is None else zeros[rows].float().unsqueeze(-1)
            off = grid.round(groups[rows] / scale + zero).sub_(zero).mul_(scale).sub_(groups[rows]).square_()
            error[rows] = (off if weights is None else off.mul_(weights[rows])).sum(-1)
        errors.append(error)
    below, above = (candidate.view(torch.uint8) for candidate in candidates)
    return torch.where(errors[0] <= errors[1], below, above).view(kind.dtype)


def _chunks(groups: torch.Tensor) -> Iterator[slice]:
    rows = max(1, _CHUNK // groups[0].numel())
    for start in range(0, len(groups), rows):
        yield slice(start, start + rows)


def _symmetric(
    groups: torch.Tensor, grid: Grid, search: bool, importance: torch.Tensor | None, signed: bool
) -> torch.Tensor:
    if signed and -grid.lowest != grid.highest:
        at = groups.abs().argmax(dim=-1, keepdim=True)
        absmax = groups.gather(-1, at) / grid.extreme  # [rows, groups, 1]
    else:
        above, below = groups.amax(-1, keepdim=True) / grid.highest, groups.amin(-1, keepdim=True) / grid.lowest
        absmax = torch.maximum(above, below)
    if not search:
        return absmax.squeeze(-1)
    weighted = groups if importance is None else groups * importance
    inverse = torch.where(absmax == 0, 0, 1 / absmax)
    lopsided = signed and not torch.equal(grid.values, -grid.values.flip(0))
    best_gain = torch.full_like(inverse, -1.0)
    best = absmax.clone()
    for sign in _ORIENTATIONS if lopsided else (1,):
        for factor in _FACTORS:
            _try_scale(groups, grid, importance, weighted, inverse * (sign * factor), best, best_gain)
    for _ in range(_REFITS):
        _try_scale(groups, grid, importance, weighted, torch.where(best == 0, 0, 1 / best), best, best_gain)
    return best.squeeze(-1)


def _try_scale(
    groups: torch.Tensor,
    grid: Grid,
    importance: torch.Tensor | None,
    weighted: torch.Tensor,
    inverse: torch.Tensor,
    best: torch.Tensor,
    best_gain: torch.Tensor,
) -> None:
    """Round with ``1 / inverse``, fit the scale to the codes by least squares, keep it where it errs less.

    With codes q the best scale is ``<w, q> / <q, q>`` (in the importance metric), and the squared error that
    it leaves is ``<w, w> - <w, q>^2 / <q, q>``: the larger that gain, the smaller the error.
    """
    q = grid.round(groups * inverse)
    dot = (weighted * q).sum(-1, keepdim=True)
    q.square_()
    if importance is not None:
        q.mul_(importance)
    norm = q.sum(-1, keepdim=True)
    gain = torch.where(norm > 0, dot.square() / norm, 0)
    better = gain > best_gain
    best_gain.copy_(torch.where(better, gain, best_gain))
    best.copy_(torch.where(better & (norm > 0), dot / norm, best))


def _asymmetric(
    groups: torch.Tensor, grid: Grid, search: bool, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    best_scale = best_zero = torch.zeros_like(low)
    best_error = torch.full_like(low, torch.inf)
    for factor in _FACTORS if search else (1.0,):
        scale = (high - low) / (factor * (grid.highest - grid.lowest))
        zero = grid.lowest - low / (factor * torch.where(scale == 0, 1, scale))
        if grid.is_integer:
            zero = zero.round().clamp(grid.lowest, grid.highest)
        decoded = grid.round(groups / torch.where(scale == 0, 1, scale) + zero).sub_(zero).mul_(scale)
        error = decoded.sub_(groups).square_()
        error = (error if importance is None else error.mul_(importance)).sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale.squeeze(-1), best_zero.squeeze(-1)
