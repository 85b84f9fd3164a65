"""What a layer is fitted to, so that it reproduces the original model's output from the quantized model's input."""

from __future__ import annotations

import torch

from quantlab.problem import InputStatistics, Rows, pieces

# Numbers of a weight that are worked on at once.
_CHUNK = 1 << 23


def target_shift(
    weight: torch.Tensor, statistics: InputStatistics, factor: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """The step from ``W`` towards the target that reproduces the original model's output: ``[out, in]``.

    Args:
        weight: ``W``, float32 ``[out, in]``.
        statistics: of its inputs, with their shift ``D = E[(x_o - x) x^T]``, and that of held-out tokens if known.
        factor: ``C`` of the inputs' damped second moment ``H = C C^T``, see :mod:`quantlab.quantizers.factor`.
        order: the permutation of the inputs that ``C`` is in.

    The least-squares step is ``S = W E[(x_o - x) x^T] H^-1``, a regression with one coefficient for each input of
    each output. With some ten or twenty tokens a coefficient much of it is noise, which fits the calibration text and
    nothing else, and every later layer is then fitted to inputs that look better than they are: at full strength a
    model is ruined. So the strength is judged on held-out tokens: the step ``S'`` that the others give is best scaled
    by ``<S', W D_held> / <S', S' H>`` (1 where both say the same, 0 where they contradict), and so is ``S``.
    """
    assert statistics.shift is not None

    def regress(rows: slice, shift: Rows) -> torch.Tensor:
        """``W shift H^-1``, multiplied by ``C`` from the right: its columns, like C's, in the order of rounding."""
        return torch.linalg.solve_triangular(factor.T, _product(weight[rows], shift)[:, order], upper=False, left=False)

    shifts = torch.empty_like(weight)
    energy, agreement = torch.zeros(2, device=weight.device)
    step = max(1, _CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        part = regress(rows, statistics.shift)
        if statistics.held_out_shift is not None:
            held = regress(rows, statistics.held_out_shift)
            others = (part - statistics.held_out * held) / (1 - statistics.held_out)
            energy += others.square().sum()
            agreement += (others * held).sum()
        shifts[rows].index_copy_(1, order, torch.linalg.solve_triangular(factor, part, upper=True, left=False))
    if statistics.held_out_shift is not None:
        shifts *= (agreement / energy.clamp(min=torch.finfo(torch.float32).tiny)).clamp(0, 1)
    return shifts


def _product(left: torch.Tensor, matrix: Rows) -> torch.Tensor:
    """``left @ matrix``, some rows of the matrix at a time."""
    total = left.new_zeros(len(left), matrix.shape[1])
    for rows in pieces(matrix):
        total.addmm_(left[:, rows], matrix[rows])
    return total
