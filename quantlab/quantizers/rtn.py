"""Round to nearest: each weight gets the grid's closest entry, once the scale is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quantlab.numerics import QTensor, apply_scales
from quantlab.problem import LayerProblem, Solution, Statistic, require
from quantlab.quantizers.base import register
from quantlab.recipe import Scheme


@register("rtn")
@dataclass(frozen=True)
class Rtn:
    """Round to nearest. Data-free, unless the scale search is weighted by the inputs' second moment."""

    name: ClassVar[str]
    rows_apart: ClassVar[bool] = True
    any_dtype: ClassVar[bool] = True

    def needs(self, scheme: Scheme) -> Statistic:
        """The diagonal of the second moment, only to weight the scale search."""
        return Statistic.DIAGONAL if scheme.scale_search == "second-moment" else Statistic.NONE

    def quantize(self, problem: LayerProblem, scheme: Scheme) -> Solution:
        """Choose scales for the weight as it stands, then round."""
        require(problem, self.needs(scheme))
        importance = problem.importance(scheme)
        grid = scheme.grid_for(problem.weight, importance)
        scales = scheme.choose_scales(problem.weight, grid, importance)
        return Solution(QTensor.of(apply_scales(problem.weight, grid, scales), scales, grid))
