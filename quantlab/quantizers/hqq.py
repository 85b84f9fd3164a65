"""HQQ: real-valued zeros that make the errors of a group sparse instead of small on average, without data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023). With the scale of each group
fixed, the zero minimizes ``sum |w - q|^p``, p below 1, which forgives a few outliers to serve the many. Half-quadratic
splitting alternates two closed forms: the error that is explained away, ``e = shrink(w - q)``, and the zero that fits
what is left, ``mean(v - (w - e) / scale)`` over the entries v of the group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from quantlab.errors import RecipeError
from quantlab.numerics import Grid, QTensor, Scales, apply_scales, group_view
from quantlab.problem import LayerProblem, Solution, Statistic, require
from quantlab.quantizers.base import register
from quantlab.recipe import Scheme
from quantlab.registry import is_number


@register("hqq")
@dataclass(frozen=True)
class Hqq:
    """Half-quadratic quantization of asymmetric schemes.

    Attributes:
        p: of the norm that is minimized; below 1 it looks away from outliers.
        beta: how closely the explained error follows the error, at first; errors are measured in steps of the group,
            so that it means the same for weights of every size.
        kappa: what beta is multiplied by after each iteration.
        iterations: at most; it stops where no group gets better.
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for option, least, most in (("p", 0.0, 1.0), ("beta", 0.0, float("inf")), ("kappa", 1.0, 10.0)):
            value = getattr(self, option)
            if not is_number(value) or not least <= value <= most or value == 0 or value == float("inf"):
                raise RecipeError(f"hqq: {option} {value!r}: use a number from {least:g} to {most:g}, above 0")
        if type(self.iterations) is not int or self.iterations < 1:
            raise RecipeError(f"hqq: iterations {self.iterations!r}: use a positive whole number")

    def needs(self, scheme: Scheme) -> Statistic:
        """Nothing, unless the scale search is weighted by the inputs' second moment.

        Raises:
            RecipeError: a symmetric scheme has no zeros to find.
        """
        if scheme.symmetric:
            raise RecipeError("hqq: finds zeros, and a symmetric scheme has none; use symmetric: false")
        return Statistic.DIAGONAL if scheme.scale_search == "second-moment" else Statistic.NONE

    def quantize(self, problem: LayerProblem, scheme: Scheme) -> Solution:
        """Take the scheme's scales, move the zeros, round to nearest."""
        require(problem, self.needs(scheme))
        importance = problem.importance(scheme)
        grid = scheme.grid_for(problem.weight, importance)
        start = scheme.choose_scales(problem.weight, grid, importance)
        scales = self.moved(problem.weight, grid, start)
        return Solution(QTensor.of(apply_scales(problem.weight, grid, scales), scales, grid))

    def moved(self, weight: torch.Tensor, grid: Grid, start: Scales) -> Scales:
        """The same scales with the zeros that leave the smallest ``sum |w - q|^p`` of each group, as stored.

        Args:
            weight: float32 ``[out, in]``.
            grid: what codes mean.
            start: its scales and zeros, which are never made worse.
        """
        assert start.zeros is not None
        per_row = start.scales.shape[1]
        groups = group_view(weight, "tensor" if len(start.scales) < len(weight) else weight.shape[1] // per_row)
        x = groups / start.decode().unsqueeze(-1)  # in steps
        dtype = start.scales.dtype if start.scales.dtype in (torch.float16, torch.float32) else torch.bfloat16
        best, best_error = start.zeros.to(dtype), torch.full(start.scales.shape, torch.inf, device=weight.device)
        zero, beta = best, self.beta
        for _ in range(self.iterations + 1):  # the last one only looks
            values = grid.round(x + zero.float().unsqueeze(-1))
            off = x - values + zero.float().unsqueeze(-1)
            error = off.abs().pow(self.p).sum(-1)
            better = error < best_error
            if not better.any():
                break
            best_error = torch.where(better, error, best_error)
            best = torch.where(better, zero, best)
            explained = off.sign() * (off.abs() - off.abs().pow(self.p - 1) / beta).clamp_(min=0)
            zero = (values - x + explained).mean(-1).to(dtype)
            beta *= self.kappa
        return Scales(start.scales, best, start.outer)
