"""Repairs that cost nothing at inference: each output's mean, and its variance, as they were before rounding.

Rounding moves the mean of an output by ``E E[x]`` for the error ``E``, and changes its variance. Both have a closed
form in what is known of the inputs: an output ``y = w x`` has the mean ``w E[x]`` and the variance
``w (E[x x^T] - E[x] E[x]^T) w^T``. The mean goes into the bias; the ratio of the standard deviations into the row's
scales, so that no code changes (the para-normalization of AdaQuant, arXiv:2006.10518, 4, without normalization layers).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from quantlab.compensation.base import Rounding, register
from quantlab.errors import RecipeError
from quantlab.numerics import scale_type
from quantlab.problem import InputStatistics, LayerProblem, Solution, Statistic, require
from quantlab.recipe import Scheme

_UNSEEN = "no calibration token reached it: its {} could not be corrected"


@register("bias")
@dataclass(frozen=True)
class BiasCorrection:
    """Move the bias by what rounding moved the mean of each output (DFQ, arXiv:1906.04721, 4.2)."""

    name: ClassVar[str]

    def needs(self, scheme: Scheme) -> Statistic:  # noqa: ARG002 - every scheme can be repaired
        """The inputs' mean."""
        return Statistic.MEAN

    def solve(self, problem: LayerProblem, scheme: Scheme, rounding: Rounding) -> Solution:
        """Round, and add ``E E[x]`` to the bias."""
        statistics = require(problem, self.needs(scheme))
        solution = rounding.quantize(problem, scheme)
        if not statistics.tokens:
            return replace(solution, notes=(*solution.notes, _UNSEEN.format("mean")))
        assert statistics.mean is not None
        target = solution.target_for(problem.weight)
        error = target - solution.qtensor.dequantize()
        return replace(solution, loss=None, bias=_times(error, statistics.mean))


@register("statistics")
@dataclass(frozen=True)
class StatisticsCorrection:
    """Give each output the mean and the variance that it had before rounding.

    An output whose rounded weights are all alike has no variance to scale; only its mean is corrected.
    """

    name: ClassVar[str]

    def needs(self, scheme: Scheme) -> Statistic:
        """The inputs' second moment and mean.

        Raises:
            RecipeError: the scales are not plain floating-point numbers of one row each.
        """
        kind = scale_type(scheme.scale_dtype)
        if kind.block or kind.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise RecipeError(
                f"compensation 'statistics' multiplies each row's scales by a factor near 1, which scale_dtype "
                f"{scheme.scale_dtype} cannot hold; use bfloat16, float16 or float32, or compensation 'bias'"
            )
        if scheme.granularity == "tensor":
            raise RecipeError(
                "compensation 'statistics' needs scales for each row, and granularity 'tensor' has one for all; use "
                "'channel' or a group size, or compensation 'bias'"
            )
        return Statistic.SECOND_MOMENT | Statistic.MEAN

    def solve(self, problem: LayerProblem, scheme: Scheme, rounding: Rounding) -> Solution:
        """Round, scale the rows, and move the bias by what is left of the means."""
        statistics = require(problem, self.needs(scheme))
        solution = rounding.quantize(problem, scheme)
        if not statistics.tokens:
            return replace(solution, notes=(*solution.notes, _UNSEEN.format("mean and variance")))
        assert statistics.mean is not None
        target = solution.target_for(problem.weight)
        qtensor = solution.qtensor
        wanted, found = _variance(target, statistics), _variance(qtensor.dequantize(), statistics)
        factor = (wanted / found).sqrt()
        factor = torch.where(factor.isfinite() & (factor > 0), factor, 1.0)
        scales = scale_type(scheme.scale_dtype).encode(qtensor.scales.float() * factor[:, None].float(), None)
        qtensor = replace(qtensor, scales=scales)
        bias = _times(target - qtensor.dequantize(), statistics.mean)  # of the scales as they are stored
        return replace(solution, qtensor=qtensor, loss=None, bias=bias)


def _times(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (weight.double() @ x.double()).float()


def _variance(weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
    """Of each output ``w x``: float64 ``[out]``; what is 0 but for the sums' rounding is 0."""
    assert statistics.second_moment is not None
    assert statistics.mean is not None
    weight = weight.double()
    square = ((weight @ statistics.second_moment.double()) * weight).sum(1)
    variance = square - (weight @ statistics.mean.double()).square()
    return torch.where(variance > 1e-6 * square, variance, 0.0)
