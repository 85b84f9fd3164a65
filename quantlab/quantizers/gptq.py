"""GPTQ: round column by column, and let the columns that are left make up for the error so far.

Frantar et al., arXiv:2210.17323. Written in its LDLQ form (Chee et al., arXiv:2307.13304), which gives the same
codes with one Cholesky factor and no inverse: with the damped second moment ``H = C C^T``, C upper triangular,
the output error of ``E = W - Q`` splits into independent squares,

    tr(E H E^T) = sum_k C_kk^2 |e_k + sum_{j<k} e_j M_jk|^2,    M_jk = C_jk / C_kk,

so column k is rounded to the entry nearest to ``w_k + sum_{j<k} e_j M_jk``, and the sum of the squares that are left
is the layer's exact output error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from quantlab.errors import QuantlabError, RecipeError
from quantlab.numerics import Granularity, Grid, QTensor, Scales, all_finite, scale_type
from quantlab.problem import LayerProblem, Solution, Statistic, require
from quantlab.quantizers.base import register
from quantlab.quantizers.factor import copy_rows, factorize
from quantlab.quantizers.rtn import Rtn
from quantlab.quantizers.target import target_shift
from quantlab.recipe import Scheme
from quantlab.registry import is_number

# Weights that are rounded at once, of some outputs: products are efficient, and the copies that are worked on small.
_CHUNK = 1 << 23
# The same on other devices, where every column costs some calls however many outputs there are.
_CHUNK_ELSEWHERE = 1 << 25
_ORDERS = ("activation", "group-aware", "natural")


@register("gptq")
@dataclass(frozen=True)
class Gptq:
    """GPTQ with act-order and static groups, searched scales and an optional target shift.

    Attributes:
        damping: added to the diagonal of the second moment, as a fraction of its mean; doubled until the
            factorization succeeds.
        order: in which order the inputs are rounded. ``activation``: by falling second moment, scales chosen
            beforehand (static groups). ``group-aware`` (GAR, arXiv:2505.14638): falling inside each group and
            group by group, so that a group's scale is chosen when its turn comes. ``natural``: as they stand.
        asym: how far the target moves from ``W`` towards ``W E[x_o x^T] H^-1``, which reproduces the *original*
            model's output from the quantized model's input: 0 (not at all) to 1, as a fraction of the step that is
            best on held-out sequences (see :mod:`quantlab.quantizers.target`).
        block: columns between two updates of the rest (speed only; the codes do not depend on it).
    """

    damping: float = 0.01
    order: str = "activation"
    asym: float = 0.0
    block: int = 64

    name: ClassVar[str]

    def __post_init__(self) -> None:
        if self.order not in _ORDERS:
            raise RecipeError(f"gptq: order {self.order!r}: use one of {', '.join(_ORDERS)}")
        if not is_number(self.damping) or not 0 < self.damping <= 1:
            raise RecipeError(f"gptq: damping {self.damping!r}: use a fraction above 0 and at most 1")
        if not is_number(self.asym) or not 0 <= self.asym <= 1:
            raise RecipeError(f"gptq: asym {self.asym!r}: use 0 to 1")
        if type(self.block) is not int or self.block < 1:
            raise RecipeError(f"gptq: block {self.block!r}: use a positive whole number")

    @property
    def rows_apart(self) -> bool:
        """Whether outputs are solved independently of each other: how far a target moves is judged by all of them."""
        return not self.asym

    def needs(self, scheme: Scheme) -> Statistic:
        """The full second moment; the shift between original and quantized inputs if the target moves.

        Raises:
            RecipeError: scales that are chosen one group after the other cannot share a second level.
        """
        if self.order != "activation" and isinstance(scheme.granularity, int) and scale_type(scheme.scale_dtype).block:
            raise RecipeError(
                f"gptq: order {self.order!r} chooses scales group by group, and scales in {scheme.scale_dtype} are "
                "chosen all at once; use order activation, or another scale_dtype"
            )
        return Statistic.SECOND_MOMENT | (Statistic.SHIFT if self.asym else Statistic.NONE)

    def quantize(self, problem: LayerProblem, scheme: Scheme) -> Solution:
        """Solve one layer; falls back to round-to-nearest, with a note, where no input was seen.

        Raises:
            QuantlabError: the inputs' second moment is not finite.
        """
        statistics = require(problem, self.needs(scheme))
        if statistics.tokens == 0:
            solution = Rtn().quantize(problem, scheme)
            return Solution(solution.qtensor, notes=("no calibration token reached it: rounded to nearest",))
        assert statistics.second_moment is not None
        if not all_finite(statistics.second_moment):
            raise QuantlabError(
                f"{problem.name}: the second moment of its inputs is not finite: the model overflows on the "
                "calibration text; convert it to bfloat16 or float32 first, or leave this layer out with format: none"
            )
        diagonal = statistics.second_moment.diagonal().clone()
        order = column_order(diagonal, self.order, scheme.granularity)
        factor, damping = factorize(statistics.second_moment, self.damping, order, statistics.spare)

        target, dead = problem.weight, diagonal == 0
        if dead.any():  # an input that is never on: its weights are free
            target = target.masked_fill(dead, 0)
        if self.asym:
            target = target_shift(problem.weight, statistics, factor, order).mul_(self.asym).add_(target)

        # Damping is part of the factor, not of the layer's error.
        added = torch.empty_like(diagonal)
        added[order] = torch.linalg.vector_norm(factor, dim=1).square_() - diagonal[order]
        qtensor, loss = self._round(target, factor, order, scheme, problem.importance(scheme))
        if statistics.spare is not None:
            copy_rows(statistics.spare, statistics.second_moment)
        for rows, decoded in qtensor.decoded_rows():
            loss[rows] -= (target[rows] - decoded).square_() @ added
        notes = (f"damping raised to {damping:.3g}",) if damping > self.damping else ()
        return Solution(qtensor, loss.clamp_(min=0), notes, target if self.asym else None)

    def _round(
        self,
        target: torch.Tensor,
        factor: torch.Tensor,
        order: torch.Tensor,
        scheme: Scheme,
        importance: torch.Tensor | None,
    ) -> tuple[QTensor, torch.Tensor]:
        """Codes for ``target [out, in]``, its columns taken in ``order``, and each output's damped loss.

        Works on transposed copies of some outputs at a time: column k of the weight is row k there, contiguous. The
        factor is used up.
        """
        grid = scheme.grid_for(target, importance)
        scales = scheme.choose_scales(target, grid, importance)
        diagonal = factor.diagonal().clone()
        feedback = factor.div_(diagonal)  # M
        codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
        loss = torch.empty(len(target), device=target.device)
        # Scales of two levels are chosen beforehand, all of them: no row changes its own.
        known = scales if scales.outer is None else Scales(scales.decode(), scales.zeros)
        step = max(1, (_CHUNK if target.device.type == "cpu" else _CHUNK_ELSEWHERE) // target.shape[1])
        for start in range(0, len(target), step):
            rows = slice(start, start + step)
            codes[rows], loss[rows] = self._round_rows(
                target[rows], feedback, diagonal, order, scheme, grid, _rows_of(known, rows), importance
            )
        return QTensor.of(codes, scales, grid), loss

    def _round_rows(
        self,
        target: torch.Tensor,
        feedback: torch.Tensor,
        diagonal: torch.Tensor,
        order: torch.Tensor,
        scheme: Scheme,
        grid: Grid,
        scales: Scales,
        importance: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and losses of some outputs; ``scales`` are theirs, and are changed where they are chosen on the way."""
        columns = target.shape[1]
        size = scheme.granularity if isinstance(scheme.granularity, int) else columns
        dynamic = self.order != "activation" and isinstance(scheme.granularity, int)
        steps, zeros = scales.decode(), scales.zeros
        group_of = (order // size).tolist()
        goal = target.T[order].contiguous()
        current = goal.clone()
        codes = torch.empty_like(goal, dtype=torch.uint8)
        loss = torch.zeros(len(target), device=target.device)
        for start, stop in _spans(columns, size if dynamic else columns, self.block):
            if dynamic and start % size == 0:
                members, group = slice(start, start + size), group_of[start]
                weights = None if importance is None else importance[order[members]]
                # The group's weights once they too make up for the error so far: what its scale must cover.
                lower, passed_on = feedback[members, members].T, current[members] - goal[members]
                moved = torch.linalg.solve_triangular(lower, passed_on, upper=False, unitriangular=True)
                part = scheme.choose_scales((goal[members] + moved).T.contiguous(), grid, weights, "channel")
                _put(scales, group, part)
                steps[:, group] = part.decode()[:, 0]
            span = slice(start, stop)
            step = steps.T[group_of[span]]
            shift = None if zeros is None else zeros.T[group_of[span]].float()
            values, error = _round_span(grid, current[span], goal[span], step, shift, feedback[span, span])
            codes[span] = grid.nearest(values)
            residual = current[span] - goal[span] + error
            loss += diagonal[span].square() @ residual.square_()
            current[stop:].addmm_(feedback[span, stop:].T, error)
        out = torch.empty_like(codes)
        out[order] = codes
        return out.T, loss


def _rows_of(scales: Scales, rows: slice) -> Scales:
    """The scales of some outputs, sharing memory with those of all; one for the whole tensor is everybody's."""
    own = rows if len(scales.scales) > 1 else slice(None)
    return Scales(scales.scales[own], None if scales.zeros is None else scales.zeros[own])


def _put(scales: Scales, group: int, part: Scales) -> None:
    """Replace the scales of one group by ``part``, scales of shape ``[out, 1]``."""
    scales.scales[:, group] = part.scales[:, 0]
    if scales.zeros is not None and part.zeros is not None:
        scales.zeros[:, group] = part.zeros[:, 0]


def _round_span(
    grid: Grid,
    current: torch.Tensor,
    goal: torch.Tensor,
    step: torch.Tensor,
    shift: torch.Tensor | None,
    feedback: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a few columns one after the other; each passes its error on to those behind it.

    Args:
        grid: what codes mean.
        current: ``[columns, out]``: the target plus the errors passed on so far; updated in place.
        goal: ``[columns, out]``: the target.
        step: ``[columns, out]``: scales.
        shift: ``[columns, out]``: zeros, or None.
        feedback: ``[columns, columns]``: this span of ``M``.

    Returns:
        ``(values, error)``, both ``[columns, out]``: grid entries, and target minus decoded weight.
    """
    values, error = torch.empty_like(current), torch.empty_like(current)
    for k in range(len(current)):
        x = current[k] / step[k]
        if shift is None:
            values[k] = value = grid.round(x)
        else:
            values[k] = value = grid.round(x.add_(shift[k]))
            value = value - shift[k]
        torch.addcmul(goal[k], value, step[k], value=-1, out=error[k])
        if k + 1 < len(current):
            current[k + 1 :].addr_(feedback[k, k + 1 :], error[k])
    return values, error


def column_order(diagonal: torch.Tensor, order: str, granularity: Granularity) -> torch.Tensor:
    """The permutation in which columns are rounded: int64 ``[in]``. Ties keep their place."""
    if order == "natural":
        return torch.arange(len(diagonal), device=diagonal.device)
    if order == "activation" or not isinstance(granularity, int):
        return diagonal.argsort(descending=True, stable=True)
    groups = diagonal.unflatten(0, (-1, granularity))
    inside = groups.argsort(dim=1, descending=True, stable=True)
    by_group = groups.amax(1).argsort(descending=True, stable=True)
    return (inside + torch.arange(len(groups), device=diagonal.device)[:, None] * granularity)[by_group].flatten()


def _spans(columns: int, size: int, block: int) -> Iterator[tuple[int, int]]:
    """Cut ``columns`` into runs of at most ``block`` that do not cross a border between groups of ``size``."""
    for group in range(0, columns, size):
        for start in range(group, group + size, block):
            yield start, min(start + block, group + size)
