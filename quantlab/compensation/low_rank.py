"""Low-rank repairs: what rounding left of the weight, approximated by ``L R`` with a few ranks.

One template, ``C = argmin tr((E - C) M (E - C)^T)`` over all C of rank r; the methods differ in the metric M:

| method | M | source |
|---|---|---|
| lorc | I | ZeroQuant-V2, arXiv:2303.08302 |
| l2qer | diag(a_i^2), a_i = E\\|x_i\\| of the sequence where it is largest | LQER, arXiv:2402.02446 |
| qera-approx | diag(E[x_i^2]) | QERA, arXiv:2410.06040 |
| qera-exact | E[x x^T] | QERA, arXiv:2410.06040; the optimum of EoRA too |

LQER divides its a_i by ``sqrt(min a * max a)``; a common factor of M changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch

from quantlab.compensation.base import Outlook, Rounding, register
from quantlab.compensation.budget import share_ranks
from quantlab.compensation.factors import DTYPES, cost, damped, factors, leading
from quantlab.errors import RecipeError
from quantlab.numerics import LowRank, QTensor, apply_scales
from quantlab.problem import InputStatistics, LayerProblem, Solution, Statistic, require
from quantlab.recipe import Scheme
from quantlab.registry import is_number


@dataclass(frozen=True)
class LowRankRepair:
    """The template: everything but the metric.

    Attributes:
        rank: of the correction; at most so many where ``energy`` chooses. Capped by the layer's smaller side.
        dtype: of the stored factors: bfloat16, float16, or int8 with a float32 scale a rank.
        energy: take the smallest rank that removes this fraction of the error in the method's metric; None takes
            ``rank`` everywhere.
        iterations: rounds of ``Q <- round(W - C), C <- fit(W - Q)``, starting with C = 0; the best counts.
        preserve: one more round, whose C holds that many leading ranks of the weight itself, so that rounding need not
            (SRR, arXiv:2602.02001); ``auto`` chooses how many. Once Q is known the correction is fitted to all of
            ``W - Q``, which is never worse than to keep these ranks and fit the others.
        budget: bits a weight that all layers with these options may spend on corrections together. Before the run they
            are shared out by what each rank would take off the layer's relative error, looking at the weights alone;
            ``rank`` is the most that a layer gets. None: every layer gets ``rank``.
    """

    rank: int = 16
    dtype: str = "bfloat16"
    energy: float | None = None
    iterations: int = 1
    preserve: int | str = 0
    budget: float | None = None

    name: ClassVar[str]
    statistic: ClassVar[Statistic] = Statistic.NONE

    def __post_init__(self) -> None:
        for option, least in (("rank", 0), ("iterations", 1)):
            value = getattr(self, option)
            if type(value) is not int or value < least:
                raise RecipeError(f"{self.name}: {option} {value!r}: use a whole number, at least {least}")
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise RecipeError(f"{self.name}: dtype {self.dtype!r}: use one of {', '.join(DTYPES)}")
        if self.energy is not None and (not is_number(self.energy) or not 0 < self.energy <= 1):
            raise RecipeError(f"{self.name}: energy {self.energy!r}: use a fraction above 0 and at most 1")
        if self.preserve != "auto" and (type(self.preserve) is not int or not 0 <= self.preserve <= self.rank):
            raise RecipeError(f"{self.name}: preserve {self.preserve!r}: use auto, or 0 to the rank, {self.rank}")
        if self.budget is not None and not (is_number(self.budget) and self.budget > 0):
            raise RecipeError(f"{self.name}: budget {self.budget!r}: use bits a weight, such as 0.1")

    def needs(self, scheme: Scheme) -> Statistic:  # noqa: ARG002 - every scheme can be repaired
        """What the metric is made of."""
        return self.statistic

    def metric(self, statistics: InputStatistics) -> torch.Tensor | None:  # noqa: ARG002
        """``[in, in]``, ``[in]``, or None for the identity."""
        return None

    def solve(self, problem: LayerProblem, scheme: Scheme, rounding: Rounding) -> Solution:
        """Round, fit a correction to what is left, and over again if asked; the best of all rounds."""
        statistics, metric = require(problem, self.statistic), None
        notes: tuple[str, ...] = ()
        if statistics.tokens:
            metric = self.metric(statistics)
        elif self.statistic:
            notes = ("no calibration token reached it: corrected as if all inputs were alike",)
        objective = _best_known(statistics, metric)
        solution = rounding.quantize(problem, scheme)
        target = solution.target_for(problem.weight)
        best = latest = self._repaired(solution, target, metric, objective)
        outside = self._preserved(target, metric)
        for _ in range(self.iterations - (outside is None)):
            if outside is None:
                if latest.correction is None:
                    break
                outside = latest.correction.product()
            solution = rounding.quantize(_moved(problem, target - outside), scheme)
            latest = self._repaired(solution, target, metric, objective)
            best = min(best, latest, key=lambda repaired: repaired.cost)
            outside = None
        qtensor = replace(best.solution.qtensor, low_rank=best.correction)
        moved = None if target is problem.weight else target
        return replace(best.solution, qtensor=qtensor, loss=None, notes=best.solution.notes + notes, target=moved)

    @property
    def plans_ahead(self) -> bool:
        """Whether there is a budget to be shared."""
        return self.budget is not None

    def foresee(self, weight: torch.Tensor, scheme: Scheme) -> Outlook:
        """The singular values of what rounding to nearest leaves, squared, relative to the weight's energy."""
        grid = scheme.grid_for(weight, None)
        scales = scheme.choose_scales(weight, grid, None)
        error = weight - QTensor.of(apply_scales(weight, grid, scales), scales, grid).dequantize()
        _, values = leading(error, None, min(self.rank, *weight.shape))
        energy = max(cost(weight, None), torch.finfo(torch.float32).tiny)
        return Outlook((weight.shape[0], weight.shape[1]), tuple((values / energy).tolist()))

    def share(self, outlooks: Mapping[str, Outlook]) -> dict[str, dict[str, Any]]:
        """Each layer's rank, in the place of the budget."""
        assert self.budget is not None
        bits = 8 * DTYPES[self.dtype].itemsize
        ranks = share_ranks(outlooks, bits, 32 if self.dtype == "int8" else 0, self.budget)
        own = {**asdict(self), "budget": None}
        return {name: {**own, "rank": rank, "preserve": self._preserve_within(rank)} for name, rank in ranks.items()}

    def _preserve_within(self, rank: int) -> int | str:
        return self.preserve if isinstance(self.preserve, str) else min(self.preserve, rank)

    def _repaired(
        self, solution: Solution, target: torch.Tensor, metric: torch.Tensor | None, objective: torch.Tensor | None
    ) -> _Repaired:
        """The best correction of a rounded layer as it will be stored, and the cost that it leaves."""
        error = target - solution.qtensor.dequantize()
        correction = self._fit(error, metric)
        left = error if correction is None else error - correction.product()
        return _Repaired(solution, correction, cost(left, objective))

    def _fit(self, error: torch.Tensor, metric: torch.Tensor | None) -> LowRank | None:
        rank = min(self.rank, *error.shape)
        vectors, values = leading(error, metric, rank)
        if self.energy is not None:
            enough = self.energy * cost(error, metric)
            before = values.cumsum(0) - values
            rank = int((before < enough).sum())
        return factors(error, vectors[:, :rank], metric, self.dtype) if rank else None

    def _preserved(self, target: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor | None:
        """The leading ranks of the weight, which the first correction holds so that rounding need not; or None."""
        rank = min(self.rank, *target.shape)
        if not rank or self.preserve == 0:
            return None
        vectors, values = leading(target, metric, rank)
        kept = _split(target, values, metric) if self.preserve == "auto" else int(self._preserve_within(rank))
        return ((vectors[:, :kept] @ vectors[:, :kept].T) @ target.double()).float() if kept else None


@dataclass(frozen=True, eq=False)
class _Repaired:
    """A rounded layer, its correction (None for rank 0), and the cost of both together."""

    solution: Solution
    correction: LowRank | None
    cost: float


def _best_known(statistics: InputStatistics, metric: torch.Tensor | None) -> torch.Tensor | None:
    """The metric closest to the layer's output that the statistics hold: rounds are compared in it."""
    if not statistics.tokens:
        return None
    if statistics.second_moment is not None:
        return statistics.second_moment
    return metric if statistics.diagonal is None else statistics.diagonal


def _moved(problem: LayerProblem, weight: torch.Tensor) -> LayerProblem:
    """The problem of rounding ``weight``, which is the target already: no method may shift it again."""
    statistics = problem.statistics
    if statistics is not None and statistics.shift is not None:
        nothing = weight.new_zeros(()).expand(statistics.shift.shape)
        statistics = replace(statistics, shift=nothing, held_out_shift=None)
    return replace(problem, weight=weight, statistics=statistics)


def _split(target: torch.Tensor, values: torch.Tensor, metric: torch.Tensor | None) -> int:
    """How many of the ranks the weight gets (SRR, arXiv:2602.02001).

    ``k`` that minimizes ``rho_k(W S) rho_(r-k)(N S)``, where ``rho_p`` is the fraction of energy that p ranks leave and
    N one draw of uniform noise, which stands for the rounding error.

    Args:
        target: ``W``, ``[out, in]``.
        values: the r leading eigenvalues of ``W M W^T``.
        metric: ``M``.
    """
    noise = torch.empty_like(target, device="cpu").uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    noise = noise.to(target.device)
    _, noise_values = leading(noise, metric, len(values))
    left, noise_left = (
        1 - torch.cat([v.new_zeros(1), v.cumsum(0)]) / max(cost(x, metric), torch.finfo(torch.float32).tiny)
        for v, x in ((values, target), (noise_values, noise))
    )
    return int((left * noise_left.flip(0)).argmin())


@register("lorc")
@dataclass(frozen=True)
class Lorc(LowRankRepair):
    """Data-free: all inputs alike."""


@register("l2qer")
@dataclass(frozen=True)
class L2qer(LowRankRepair):
    """Inputs weighted by the square of their largest mean magnitude."""

    statistic: ClassVar[Statistic] = Statistic.MAGNITUDE

    def metric(self, statistics: InputStatistics) -> torch.Tensor:
        """``diag(a_i^2)``."""
        assert statistics.magnitude is not None
        return damped(statistics.magnitude.square())


@register("qera-approx")
@dataclass(frozen=True)
class QeraApprox(LowRankRepair):
    """Inputs weighted by their second moments, as if they were uncorrelated."""

    statistic: ClassVar[Statistic] = Statistic.DIAGONAL

    def metric(self, statistics: InputStatistics) -> torch.Tensor:
        """``diag(E[x_i^2])``."""
        assert statistics.diagonal is not None
        return damped(statistics.diagonal)


@register("qera-exact")
@dataclass(frozen=True)
class QeraExact(LowRankRepair):
    """The least error of the layer's output that a rank can leave."""

    statistic: ClassVar[Statistic] = Statistic.SECOND_MOMENT

    def metric(self, statistics: InputStatistics) -> torch.Tensor:
        """``E[x x^T]``."""
        assert statistics.second_moment is not None
        return damped(statistics.second_moment)
