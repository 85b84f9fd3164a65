"""Which variants to look at: the points that no other beats, the knee, and the best or smallest within limits.

Records in, answers out. A record is a mapping whose ``measures`` holds figures under the names of
:mod:`quantlab_evals.measures`; one without a figure (None, or not there) takes no part where that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import EvalError
from .measures import Measure, measure_called

Record = Mapping[str, Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Limit:
    """What a variant's figure may be: `low` to `high`, both included."""

    measure: Measure
    low: float = -math.inf
    high: float = math.inf

    def holds(self, record: Record) -> bool:
        """Whether a variant keeps to it; one that was not measured does not."""
        value = figure(record, self.measure)
        return value is not None and self.low <= value <= self.high

    def __str__(self) -> str:
        low = [f"at least {self.low:.4g}"] if self.low > -math.inf else []
        high = [f"at most {self.high:.4g}"] if self.high < math.inf else []
        return f"{self.measure.label} {' and '.join(low + high)}"


@dataclass(frozen=True)
class Front:
    """The variants that no other beats by some measures.

    Attributes:
        measures: the axes.
        records: that have all of them, in the order in which they came.
        members: places in `records` of those that no other beats, in the order of the first measure.
        knee: the place in `records` of the member at which the front bends; None for fewer than three members.
        hypervolume: share of the box between `ideal` and `reference` that the front dominates, 0 to 1, in the
            scales of the axes (logarithms where a measure is logarithmic).
        reference: a figure a measure, which is worse than the front.
        ideal: the best figure of each measure.
    """

    measures: tuple[Measure, ...]
    records: tuple[Record, ...]
    members: tuple[int, ...]
    knee: int | None
    hypervolume: float
    reference: tuple[float, ...]
    ideal: tuple[float, ...]


def non_dominated(points: ArrayLike) -> list[int]:
    """Rows of `points` `[n, d]`, lower being better, that no other row dominates, in their order.

    A row dominates another if it is nowhere higher and somewhere lower: of equal rows none dominates.
    """
    rows = _matrix(points)
    return [i for i, row in enumerate(rows) if not ((rows <= row).all(1) & (rows < row).any(1)).any()]


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Volume that `points` `[n, d]` dominate within `reference` `[d]`, lower being better; exact, for any d.

    Slabs along the last axis, each with the volume of the points below it (Fonseca et al. 2006, without bounds):
    n^(d-1) log n, which is nothing for a few hundred points in two or three dimensions.
    """
    corner = np.asarray(reference, dtype=np.float64)
    rows = _matrix(points)
    inside = rows[(rows < corner).all(1)]
    if not len(inside):
        return 0.0
    if len(corner) == 1:
        return float(corner[0] - inside[:, 0].min())
    inside = inside[inside[:, -1].argsort()]
    tops = np.append(inside[1:, -1], corner[-1])
    slabs = zip(inside[:, -1], tops, range(1, len(inside) + 1), strict=True)
    return sum(
        (top - bottom) * hypervolume(inside[:below, :-1], corner[:-1]) for bottom, top, below in slabs if top > bottom
    )


def knee(points: ArrayLike) -> int | None:
    """The row of a front `[n, d]`, lower being better, that lies furthest below the plane through its ends.

    Every axis is scaled to 0 (the front's best) to 1 (its worst); in two dimensions that is the distance from the
    line between the front's ends (Das 1999). None for fewer than three rows, or if none lies below.
    """
    rows = _matrix(points)
    if len(rows) < 3:
        return None
    low, high = rows.min(0), rows.max(0)
    scaled = (rows - low) / np.where(high > low, high - low, 1.0)
    depth = 1 - scaled.sum(1)
    deepest = int(depth.argmax())
    return deepest if depth[deepest] > 0 else None


def figure(record: Record, measure: Measure) -> float | None:
    """A variant's figure, or None."""
    value = record.get("measures", {}).get(measure.name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def pareto(records: Iterable[Record], measures: Sequence[str], reference: Mapping[str, float] | None = None) -> Front:
    """The front of some records under two or three measures.

    Args:
        records: see above.
        measures: names; which way is better is known of each.
        reference: figures by measure for the hypervolume; of those that are not given, the worst of all records.

    Raises:
        EvalError: not two or three measures, one that is not known, or no record that has them all.
    """
    axes = tuple(measure_called(name) for name in measures)
    if len(axes) not in (2, 3) or len({axis.name for axis in axes}) != len(axes):
        raise EvalError(f"measures {', '.join(measures)}: name two or three different ones, such as bits,kl")
    whole = tuple(record for record in records if all(figure(record, axis) is not None for axis in axes))
    if not whole:
        raise EvalError(f"no variant has all of {', '.join(measures)}; choose measures that were taken")
    values = np.array([[figure(record, axis) for axis in axes] for record in whole], dtype=np.float64)
    costs = _costs(values, values, axes, rounded=True)
    members = sorted(non_dominated(costs), key=lambda place: (values[place, 0], tuple(costs[place])))
    exact = _costs(values, values, axes)
    given = reference or {}
    for name in given:
        if name not in measures:
            raise EvalError(f"reference {name}: is none of the measures {', '.join(measures)}")
    best, worst = (
        [_edge(column, axis, good) for column, axis in zip(values.T, axes, strict=True)] for good in (True, False)
    )
    corner = np.array([given.get(axis.name, edge) for axis, edge in zip(axes, worst, strict=True)])
    box = _costs(np.stack([best, corner]), values, axes)
    sides = box[1] - box[0]
    volume = hypervolume(exact[members], box[1]) / sides.prod() if (sides > 0).all() else 0.0
    bend = knee(exact[members])
    return Front(
        measures=axes,
        records=whole,
        members=tuple(members),
        knee=None if bend is None else members[bend],
        hypervolume=float(volume),
        reference=tuple(map(float, corner)),
        ideal=tuple(best),
    )


def best(records: Iterable[Record], by: str, limits: Sequence[Limit] = ()) -> Record | None:
    """The record with the best figure of those that keep to all limits; of equals the first."""
    measure = measure_called(by)
    sign = -1.0 if measure.higher_is_better else 1.0
    found = [(value, record) for record in records if (value := figure(record, measure)) is not None]
    kept = [(sign * value, record) for value, record in found if all(limit.holds(record) for limit in limits)]
    return min(kept, key=lambda pair: pair[0])[1] if kept else None


def within(original: Record, name: str, share: float) -> Limit:
    """At most so much worse than the original's figure: ``within(original, "ppl", 0.01)``.

    Raises:
        EvalError: the original has no such figure.
    """
    measure = measure_called(name)
    value = figure(original, measure)
    if value is None:
        raise EvalError(f"within {name}: the original has no {measure.label}; give a bound instead: --under {name}=...")
    room = abs(value) * share
    return Limit(measure, low=value - room) if measure.higher_is_better else Limit(measure, high=value + room)


def _edge(column: Floats, axis: Measure, good: bool) -> float:
    return float(column.max() if axis.higher_is_better == good else column.min())


def _costs(values: Floats, of: Floats, axes: Sequence[Measure], rounded: bool = False) -> Floats:
    """Figures as costs, lower being better, in the axes' scales; `of` are all figures that there are.

    On a logarithmic axis what is not positive counts as the smallest that is.
    """
    columns = []
    for column, all_of_it, axis in zip(values.T, of.T, axes, strict=True):
        cost = column
        if rounded and axis.resolution:
            cost = np.round(cost / axis.resolution)
        elif axis.logarithmic and not rounded:
            positive = all_of_it[all_of_it > 0]
            cost = np.log10(np.maximum(cost, positive.min() if len(positive) else 1.0))
        columns.append(-cost if axis.higher_is_better else cost)
    return np.stack(columns, axis=1)


def _matrix(points: ArrayLike) -> Floats:
    rows = np.asarray(points, dtype=np.float64)
    return rows.reshape(len(rows), -1)
