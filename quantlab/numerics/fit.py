"""Tables fitted to weights: the exponent of a power grid, and codebooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import minimize

from quantlab.numerics.grid import Grid
from quantlab.numerics.scale import Granularity, choose_scales, group_view
from quantlab.numerics.tables import power

# How much of a weight is looked at: an exponent is one number, a codebook a few.
_POWER_ELEMENTS = 1 << 16
_CODEBOOK_ELEMENTS = 1 << 20
_EXPONENTS = (0.2, 1.0)
# Cells of the histogram whose best partition is found exactly, and Lloyd steps on the weights themselves.
_CELLS = 1024
_LLOYD = 20


@dataclass(frozen=True, eq=False)
class Sample:
    """A weight to fit a table to.

    Attributes:
        weight: float32 ``[out, in]``.
        granularity: what will share a scale.
        importance: ``[in]``, the second moment of each input, or None.
    """

    weight: torch.Tensor
    granularity: Granularity
    importance: torch.Tensor | None = None

    def rows(self, elements: int) -> torch.Tensor:
        """About ``elements`` weights: rows spread evenly, whole ones."""
        count = max(1, min(len(self.weight), elements // self.weight.shape[1]))
        return self.weight[torch.linspace(0, len(self.weight) - 1, count, device=self.weight.device).long()]

    def share(self, samples: int) -> Sample:
        """As much of it as :func:`fit_power` looks at where it is given so many samples."""
        return Sample(self.rows(max(1 << 10, _POWER_ELEMENTS // samples)).clone(), self.granularity, self.importance)


def fit_power(bits: int, samples: Sequence[Sample]) -> Grid:
    """The power grid whose exponent leaves the smallest sum of relative squared errors, by Nelder-Mead from 0.5.

    Each weight keeps abs-max scales while exponents are compared, so no search runs inside the search. One sample gives
    a layer's exponent, all layers' samples the network's. Without importance it is data-free.

    Source: PowerQuant (arXiv:2301.09858), 3.3.
    """
    parts = [sample.share(len(samples)) for sample in samples]

    def loss(point: Sequence[float]) -> float:
        exponent = float(point[0])
        if not _EXPONENTS[0] <= exponent <= _EXPONENTS[1]:
            return float("inf")
        grid = power(bits, exponent)
        return sum(_relative_error(grid, part) for part in parts)

    found = minimize(
        loss, [0.5], method="Nelder-Mead", options={"xatol": 2e-3, "fatol": 0.0, "initial_simplex": [[0.5], [0.7]]}
    )
    return power(bits, round(float(found.x[0]), 4))


def _relative_error(grid: Grid, sample: Sample) -> float:
    rows = sample.weight
    scales = choose_scales(rows, grid, sample.granularity, search=False)
    steps = scales.decode().unsqueeze(-1)
    groups = rows.unflatten(1, (steps.shape[1], -1))
    error = (grid.round(groups / steps) * steps - groups).flatten(1).square()
    energy = rows.square()
    if sample.importance is not None:
        error, energy = error * sample.importance, energy * sample.importance
    return float(error.sum() / energy.sum().clamp(min=torch.finfo(torch.float32).tiny))


def fit_codebook(bits: int, samples: Sequence[Sample]) -> Grid:
    """The ``2^bits`` values with the smallest weighted squared error over weights divided by their abs-max scales.

    In one dimension the best clusters are intervals: the best partition of a fine histogram is found exactly by dynamic
    programming, and Lloyd's steps on the weights settle what its cells blur. The ends -1 and 1 are no part of it: outer
    values lie where they err least, and the scale search does the rest.
    """
    parts = [_normalized(sample, _CODEBOOK_ELEMENTS // len(samples)) for sample in samples]
    values, mass = (torch.cat(column) for column in zip(*parts, strict=True))
    order = values.argsort()
    values, mass = values[order].double(), mass[order].double()
    centres = _histogram_centres(values, mass, 2**bits)
    total, moment = (torch.cat([x.new_zeros(1), x.cumsum(0)]) for x in (mass, mass * values))
    for _ in range(_LLOYD):
        cuts = torch.searchsorted(values, (centres[1:] + centres[:-1]) / 2)
        cuts = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), len(values))])
        weight, sums = total[cuts].diff(), moment[cuts].diff()
        centres = torch.where(weight > 0, sums / weight.clamp(min=1e-300), centres)
    values = centres.float().cpu().unique()
    if len(values) < 2:  # nothing, or one value over and over: a table has two
        values = torch.cat([values, torch.tensor([0.0, 1.0])]).unique()[:2]
    return Grid(f"codebook{bits}", bits, values)


def _normalized(sample: Sample, elements: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights divided by the largest magnitude of their group, and how much each counts; both flat."""
    rows = sample.rows(elements)
    groups = group_view(rows, sample.granularity)
    largest = groups.abs().amax(-1, keepdim=True)
    importance = torch.ones_like(rows) if sample.importance is None else sample.importance.expand_as(rows)
    mass = group_view(importance, sample.granularity) * largest.square()
    return (groups / largest.clamp(min=torch.finfo(torch.float32).tiny)).flatten(), mass.flatten()


def _histogram_centres(values: torch.Tensor, mass: torch.Tensor, count: int) -> torch.Tensor:
    """The centres of the best ``count`` intervals of a histogram of ``values`` (ascending), exactly.

    Fewer where there are fewer different values; an empty histogram has none.
    """
    cell = ((values + 1) * (_CELLS / 2)).long().clamp(0, _CELLS - 1)
    sums = torch.zeros(3, _CELLS, dtype=torch.float64, device=values.device)
    for row, term in enumerate((mass, mass * values, mass * values.square())):
        sums[row].index_add_(0, cell, term)
    sums = sums[:, sums[0] > 0]
    cells = sums.shape[1]
    if cells <= count:
        return sums[1] / sums[0]
    zero, one, two = torch.cat([sums.new_zeros(3, 1), sums.cumsum(1)], dim=1)
    # cost[i, j]: squared error of cells i .. j-1 around their mean.
    weight = (zero[None] - zero[:, None]).clamp(min=1e-300)
    cost = (two[None] - two[:, None]) - (one[None] - one[:, None]).square() / weight
    cost = torch.where(torch.ones_like(cost).triu(1).bool(), cost, torch.inf)
    best = cost[0]
    choices = []
    for _ in range(count - 1):
        best, choice = (best[:, None] + cost).min(0)
        choices.append(choice)
    cuts = [cells]
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1]]))
    edges = torch.tensor([0, *reversed(cuts)])
    return one[edges].diff() / zero[edges].diff()
