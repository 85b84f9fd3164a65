"""A second moment as a triangular factor, in the memory of one matrix: for a wide layer, most of what a run takes."""

from __future__ import annotations

import torch

from quantlab.problem import PIECE, Rows, pieces


def factorize(
    moment: torch.Tensor, damping: float, order: torch.Tensor | None = None, spare: Rows | None = None
) -> tuple[torch.Tensor, float]:
    """Upper triangular ``C`` with ``C C^T = H + damping * mean(diag H) * I``, and the damping that it took.

    Args:
        moment: ``H``, float32 ``[n, n]``; an input that was never on has a zero row and column.
        damping: where to start, as a fraction of the mean of H's diagonal; doubled until the factorization succeeds.
        order: a permutation of rows and columns to take ``H`` in; None: as they stand.
        spare: where ``H`` waits, if ``C`` is to take its place in memory; None: ``moment`` is left as it is.
    """
    order = torch.arange(len(moment), device=moment.device) if order is None else order
    backwards = order.flip(0)
    places = backwards.argsort()  # of the rows of H, in the matrix turned by 180 degrees
    diagonal = moment.diagonal()[backwards]
    dead = diagonal == 0
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    if spare is not None:
        copy_rows(moment, spare)
    while True:
        # The Cholesky factor of the matrix turned by 180 degrees, turned back, is upper triangular. All of it happens
        # in one copy.
        turned = torch.empty_like(moment) if spare is None else moment
        for rows in pieces(moment):
            turned[places[rows]] = (moment if spare is None else spare)[rows][:, backwards]
        turned.diagonal().add_(torch.where(dead, mean, damping * mean))
        failed = torch.empty((), dtype=torch.int32, device=moment.device)
        torch.linalg.cholesky_ex(turned.mT, upper=True, out=(turned.mT, failed))  # in the layout of LAPACK
        if not failed:
            return _turn(turned), damping
        damping *= 2


def copy_rows(source: Rows, target: Rows) -> None:
    """Copy a matrix, which may be on the disk, some rows at a time."""
    for rows in pieces(source):
        target[rows] = source[rows]


def _turn(matrix: torch.Tensor, step: int = PIECE) -> torch.Tensor:
    """Turn a square matrix by 180 degrees where it lies."""
    size = len(matrix)
    half = size // 2
    for start in range(0, half, step):
        upper, lower = slice(start, min(start + step, half)), slice(max(size - start - step, size - half), size - start)
        turned = matrix[upper].flip(0, 1)
        matrix[upper] = matrix[lower].flip(0, 1)
        matrix[lower] = turned
    if size % 2:
        matrix[half] = matrix[half].flip(0)
    return matrix
