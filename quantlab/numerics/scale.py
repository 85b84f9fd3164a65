"""How scales are chosen: granularity, abs-max and search, symmetric and asymmetric.

Symmetric scales are *full-range and signed*: the weight of largest magnitude maps to the grid's extreme (code
-2^(b-1) of an integer grid), so that no code is wasted (the "opt-RTN" of llama.cpp and AutoRound).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantlab.numerics.grid import Grid

Granularity = int | str  # a group size along the inputs, "channel" or "tensor"

# Steps of the search, as multiples of the abs-max scale's inverse: above 1 clips the largest weights, below 1
# leaves the outermost codes unused. Least-squares refits of the best step then settle between the steps.
_FACTORS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.42, 1.55, 1.7)
_REFITS = 2
# A lopsided grid (int: -8..7) is also tried the other way round, where the extreme weight takes the +7.
_ORIENTATIONS = (1, -1)
# Elements that are searched at once: enough to hide the cost of a call, few enough to stay in the cache.
_CHUNK = 1 << 17


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
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales, and zeros where asymmetric, for a weight ``[out, in]``.

    Args:
        weight: float32 ``[out, in]``.
        grid: what codes mean.
        granularity: a group size that divides ``in``, ``"channel"`` or ``"tensor"``.
        symmetric: no zero; the scale carries a sign.
        search: minimize ``sum importance * error^2`` a group over a range of scales, each with the codes' own
            least-squares scale; otherwise the abs-max (or min-max) scale.
        importance: ``[in]``, the second moment of each input ``E[x_j^2]``; None counts all inputs alike.
        dtype: in which scales are stored; the returned scales have it.

    Returns:
        ``(scales, zeros)``, each ``[out, groups]``, ``[out, 1]`` or ``[1, 1]``; zeros are None if symmetric,
        int8 for integer grids and of ``dtype`` for others.

    Source: algorithms of llama.cpp's ``make_qx_quants`` family, full-range form as in AutoRound's opt-RTN.
    """
    groups = group_view(weight, granularity)
    weights = None if importance is None else group_view(importance.expand_as(weight), granularity)
    choose = _symmetric if symmetric else _asymmetric
    scales = torch.empty(groups.shape[:2], dtype=dtype, device=weight.device)
    zeros = None if symmetric else torch.empty_like(scales, dtype=torch.int8 if grid.is_integer else dtype)
    for rows in _chunks(groups):
        part = None if weights is None else weights[rows]
        scale, zero = choose(groups[rows], grid, search, part)
        scales[rows] = _representable(scale, dtype)
        if zeros is not None and zero is not None:
            zeros[rows] = zero.to(zeros.dtype)
    return scales, zeros


def apply_scales(weight: torch.Tensor, grid: Grid, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """Codes uint8 ``[out, in]`` of the entries nearest to ``weight / scale + zero``."""
    groups = weight.unflatten(1, (scales.shape[1], -1))
    scaled = groups / scales.float().unsqueeze(-1)
    if zeros is not None:
        scaled += zeros.float().unsqueeze(-1)
    return grid.nearest(scaled).flatten(1)


def _chunks(groups: torch.Tensor) -> Iterator[slice]:
    rows = max(1, _CHUNK // groups[0].numel())
    for start in range(0, len(groups), rows):
        yield slice(start, start + rows)


def _representable(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale in its stored type, never zero or infinite: a group of zeros keeps 1."""
    info = torch.finfo(dtype)
    magnitude = scale.abs().clamp(info.tiny, info.max)
    return torch.where(scale == 0, torch.ones_like(scale), magnitude.copysign(scale)).to(dtype)


def _symmetric(
    groups: torch.Tensor, grid: Grid, search: bool, importance: torch.Tensor | None
) -> tuple[torch.Tensor, None]:
    at = groups.abs().argmax(dim=-1, keepdim=True)
    absmax = groups.gather(-1, at) / grid.extreme  # [rows, groups, 1]
    if not search:
        return absmax.squeeze(-1), None
    weighted = groups if importance is None else groups * importance
    inverse = torch.where(absmax == 0, 0, 1 / absmax)
    lopsided = not torch.equal(grid.values, -grid.values.flip(0))
    best_gain = torch.full_like(inverse, -1.0)
    best = absmax.clone()
    for sign in _ORIENTATIONS if lopsided else (1,):
        for factor in _FACTORS:
            _try_scale(groups, grid, importance, weighted, inverse * (sign * factor), best, best_gain)
    for _ in range(_REFITS):
        _try_scale(groups, grid, importance, weighted, torch.where(best == 0, 0, 1 / best), best, best_gain)
    return best.squeeze(-1), None


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
