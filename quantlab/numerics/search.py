"""The scale of each group, before it is stored: abs-max or min-max, or the best of a search.

Symmetric scales are *full-range*: the weight of largest magnitude maps to the grid's extreme. Where a grid is longer on
one side (an integer grid's code -2^(b-1)) they are signed, so that no code is wasted (the "opt-RTN" of llama.cpp and
AutoRound). Groups are ``[rows, groups, size]``, what is found for them ``[rows, groups]``.
"""

from __future__ import annotations

import torch
from quantlab_kernels import quantizing

from quantlab.numerics.grid import Grid

# Steps of the search, as multiples of the abs-max scale's inverse: above 1 clips the largest weights, below 1
# leaves the outermost codes unused. Least-squares refits of the best step then settle between the steps.
_FACTORS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.42, 1.55, 1.7)
_REFITS = 2
# A lopsided grid (int: -8..7) is also tried the other way round, where the extreme weight takes the +7.
_ORIENTATIONS = (1, -1)
# Asymmetric ranges: how much of min-max is kept, and, where a zero may lie anywhere, of what is cut, how much above.
# A table's best codes hold two unknowns each way, so refits go on for longer.
_KEPT = (1.15, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
_SIDES = (0.5, 0.0, 0.25, 0.75, 1.0)
_TABLE_REFITS = 4


def symmetric_scales(
    groups: torch.Tensor, grid: Grid, search: bool, importance: torch.Tensor | None, signed: bool
) -> torch.Tensor:
    """The scale of each group; 0 for a group of zeros.

    Args:
        groups: float32 ``[rows, groups, size]``.
        grid: what codes mean.
        search: look for the smallest squared error; otherwise abs-max.
        importance: like ``groups``, what each squared error counts; None if all alike.
        signed: whether scales may be negative.
    """
    if signed and not _is_level(grid):
        at = groups.abs().argmax(dim=-1, keepdim=True)
        absmax = groups.gather(-1, at) / grid.extreme  # [rows, groups, 1]
    else:
        # An end that lies on its own side of zero can hold what lies there.
        ends = [groups.amax(-1, keepdim=True) / grid.highest] if grid.highest > 0 else []
        ends += [groups.amin(-1, keepdim=True) / grid.lowest] if grid.lowest < 0 else []
        absmax = torch.stack(ends).amax(0).clamp(min=0)
    if not search:
        return absmax.squeeze(-1)
    weighted = groups if importance is None else groups * importance
    inverse = torch.where(absmax == 0, 0, 1 / absmax)
    best_gain = torch.full_like(inverse, -1.0)
    best = absmax.clone()
    for factor in _factors(grid, signed):
        _try_scale(groups, grid, importance, weighted, inverse * factor, best, best_gain)
    for _ in range(_REFITS):
        _try_scale(groups, grid, importance, weighted, torch.where(best == 0, 0, 1 / best), best, best_gain)
    return best.squeeze(-1)


def compiled_symmetric_scales(
    groups: torch.Tensor, grid: Grid, search: bool, importance: torch.Tensor | None, signed: bool
) -> torch.Tensor | None:
    """:func:`symmetric_scales` by compiled kernels, or None where there are none for this.

    Abs-max scales are the same; searched ones may differ where two scales are as good, by the last bits of a sum.

    Args:
        groups: as there, but in any dtype that the kernels take.
        grid: as there.
        search: as there.
        importance: as there; the same for each row.
        signed: as there.
    """
    if not _is_level(grid) and not signed:
        return None  # each end has a peak of its own
    peaks = quantizing.group_peaks(groups)
    if peaks is None:
        return None
    absmax = peaks.abs() / grid.highest if _is_level(grid) else peaks / grid.extreme
    if not search:
        return absmax
    counts = None if importance is None else importance[0].flatten()
    return quantizing.search_scales(groups, absmax, grid.values, grid.borders, counts, _factors(grid, signed), _REFITS)


def _is_level(grid: Grid) -> bool:
    """Whether the grid reaches as far below 0 as above."""
    return -grid.lowest == grid.highest


def _factors(grid: Grid, signed: bool) -> list[float]:
    """What the abs-max scale's inverse is tried times."""
    lopsided = signed and not torch.equal(grid.values, -grid.values.flip(0))
    return [sign * factor for sign in (_ORIENTATIONS if lopsided else (1,)) for factor in _FACTORS]


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


def asymmetric_scales(
    groups: torch.Tensor, grid: Grid, search: bool, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the zero of each group; scale 0 for a group of zeros. Arguments as :func:`symmetric_scales`.

    Between alternatives the codes are fitted by least squares, and what errs least as it will be rounded is kept. An
    integer grid's zero is one of its entries, so that 0 is exact; a table's lies anywhere.
    """
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    # A whole zero within the grid means that the range holds 0; and a constant group needs a range at all.
    alike = high == low
    around = torch.ones_like(alike) if grid.is_integer else alike
    low, high = torch.where(around, low.clamp(max=0), low), torch.where(around, high.clamp(min=0), high)
    found = _Asymmetric(groups, grid, importance)
    span = grid.highest - grid.lowest
    sides = (0.0,) if grid.is_integer else _SIDES
    for kept in _KEPT if search else (1.0,):
        scale = (high - low) * (kept / span)
        for side in sides if kept != 1 else (0.0,):
            # Integers shrink towards 0, so that the zero stays; tables from either side or both.
            start = low * kept if grid.is_integer else low + (high - low) * ((1 - kept) * (1 - side))
            found.attempt(scale, grid.lowest - start / torch.where(scale == 0, 1, scale))
    if search:
        for _ in range(_REFITS if grid.is_integer else _TABLE_REFITS):
            found.attempt(*found.refit())
    return found.scale.squeeze(-1), torch.where(found.scale == 0, found.resting_zero, found.zero).squeeze(-1)


class _Asymmetric:
    """The best scale and zero of each group so far.

    Attributes:
        scale: ``[rows, groups, 1]``.
        zero: of the same shape, in units of the grid.
        error: of the same shape, the squared error that they leave.
        resting_zero: the zero under which a group of zeros is exact.
    """

    def __init__(self, groups: torch.Tensor, grid: Grid, importance: torch.Tensor | None) -> None:
        self._groups, self._grid, self._importance = groups, grid, importance
        self.scale = self.zero = groups.new_zeros((*groups.shape[:-1], 1))
        self.error = torch.full_like(self.scale, torch.inf)
        self.resting_zero = float(grid.values[grid.values.abs().argmin()])

    def attempt(self, scale: torch.Tensor, zero: torch.Tensor) -> None:
        """Keep this scale and zero where they err less."""
        zero = self._allowed(zero)
        step = torch.where(scale == 0, 1, scale)
        decoded = self._grid.round(self._groups / step + zero).sub_(zero).mul_(scale)
        error = self._sum(decoded.sub_(self._groups).square_())
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)

    def refit(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero that fit the codes of the best so far by least squares: ``w ~ (v - zero) * scale``."""
        step = torch.where(self.scale == 0, 1, self.scale)
        v = self._grid.round(self._groups / step + self.zero)
        total = self._sum(torch.ones_like(v)).clamp(min=torch.finfo(torch.float32).tiny)
        mean_v, mean_w = self._sum(v) / total, self._sum(self._groups) / total
        centred = v - mean_v
        spread = self._sum(centred.square())
        scale = self._sum(centred * (self._groups - mean_w)) / spread
        usable = (spread > 0) & (scale > 0) & scale.isfinite()
        scale = torch.where(usable, scale, self.scale)
        zero = self._allowed(mean_v - mean_w / torch.where(scale == 0, 1, scale))
        if self._grid.is_integer:  # whole zeros move in jumps: the scale once more, for the one that it is
            v = v.sub_(zero)
            norm = self._sum(v.square())
            scale = torch.where(norm > 0, self._sum(v * self._groups) / norm, scale)
        return torch.where(usable, scale, self.scale), torch.where(usable, zero, self.zero)

    def _allowed(self, zero: torch.Tensor) -> torch.Tensor:
        return zero.round().clamp(self._grid.lowest, self._grid.highest) if self._grid.is_integer else zero

    def _sum(self, terms: torch.Tensor) -> torch.Tensor:
        return (terms if self._importance is None else terms * self._importance).sum(-1, keepdim=True)
