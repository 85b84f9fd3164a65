"""The best low-rank approximation of a weight error under a metric of the inputs, and how its factors are stored.

An error ``E`` of a layer's weight costs ``tr(E M E^T)`` of its output, where the metric ``M`` is the inputs' second
moment, its diagonal (a vector) or the identity (None). With any ``S S^T = M`` the best correction of rank r is
``[E S]_r S^-1``, where ``[.]_r`` keeps the r largest singular values (Eckart-Young). As ``[E S]_r = U U^T E S`` with
the leading left singular vectors ``U`` of ``E S``, the root S drops out:

    C = U U^T E,    U: the leading eigenvectors of E M E^T.

So one eigenvalue problem serves every metric, no root and no inverse is formed, a singular second moment is no special
case, and methods that differ by a rotation of S are the same.
"""

from __future__ import annotations

import torch

from quantlab.numerics import LowRank

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
# Up to this size the eigenvalue problem is solved exactly; beyond it by subspace iteration.
_EXACT = 1024
_PANEL = 1024
_OVERSAMPLING = 10
_ITERATIONS = 8
# Directions that no input had cost next to nothing, not nothing: among them the weight's own error decides.
_DAMPING = 1e-6
# Eigenvalues, relative to the largest, below which a direction of the right factor is left as it is in the refit.
_NEGLIGIBLE = 1e-8


def damped(metric: torch.Tensor) -> torch.Tensor:
    """A second moment ``[in, in]`` or its diagonal ``[in]`` with a little of its mean added to the diagonal."""
    damped = metric.clone()
    diagonal = damped if metric.ndim == 1 else damped.diagonal()
    diagonal += _DAMPING * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return damped


def weighted(x: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor:
    """``x M`` for rows ``x [..., in]``."""
    if metric is None:
        return x
    if metric.ndim == 1:
        return x * metric.to(x.dtype)
    # In panels: a float64 copy of a large second moment would be the peak of the run's memory.
    return torch.cat([x @ panel.to(x.dtype) for panel in metric.split(_PANEL, dim=1)], dim=1)


def cost(error: torch.Tensor, metric: torch.Tensor | None) -> float:
    """``tr(E M E^T)`` of an error ``[out, in]``."""
    return float((weighted(error, metric) * error).sum(dtype=torch.float64))


def leading(error: torch.Tensor, metric: torch.Tensor | None, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The leading eigenvectors ``[out, count]`` and eigenvalues ``[count]``, falling, of ``E M E^T``; float64.

    The eigenvalues are the squared singular values of ``E S``: what each rank takes off the cost. A layer with more
    than a thousand inputs and outputs is solved by subspace iteration from a seeded start (Halko et al.,
    arXiv:0909.4061, 4.4).
    """
    rows, columns = error.shape
    if min(rows, columns) > _EXACT and 4 * (count + _OVERSAMPLING) < min(rows, columns):
        return _subspace_iteration(error, metric, count)
    error, basis = error.double(), None
    if rows > columns:  # E = basis @ small: the eigenvectors lie in the columns' space
        basis, error = torch.linalg.qr(error)
    values, vectors = torch.linalg.eigh(weighted(error, metric) @ error.T)
    vectors = vectors[:, -count:].flip(1) if count else vectors[:, :0]
    values = values[-count:].flip(0).clamp(min=0) if count else values[:0]
    return vectors if basis is None else basis @ vectors, values


def _subspace_iteration(
    error: torch.Tensor, metric: torch.Tensor | None, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`leading`. Products are float32: at this size memory counts, and the subspace forgives it."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(error), count + _OVERSAMPLING, generator=generator).to(error)
    for _ in range(_ITERATIONS):
        basis, _ = torch.linalg.qr(error @ weighted(basis.T @ error, metric).T)
    inside = basis.T @ error
    values, vectors = torch.linalg.eigh((weighted(inside, metric) @ inside.T).double())
    vectors = basis.double() @ vectors[:, -count:].flip(1)
    return vectors, values[-count:].flip(0).clamp(min=0)


def factors(error: torch.Tensor, vectors: torch.Tensor, metric: torch.Tensor | None, dtype: str) -> LowRank:
    """The correction ``U U^T E`` as two factors of like size, stored as ``dtype``.

    The right factor is rounded first, and the left one fitted to the rounded right one (a regression) before it is
    rounded in its turn: it makes up for part of the other's rounding (as in CALDERA, arXiv:2405.18886, 4).

    Args:
        error: ``E``, ``[out, in]``.
        vectors: ``U``, ``[out, rank]``, orthonormal.
        metric: ``M``; see the module.
        dtype: one of :data:`DTYPES`; int8 factors have one scale a rank.
    """
    right = vectors.T @ error.double()
    size = right.norm(dim=1).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    left, right = vectors * size, right / size[:, None]
    stored_right, right_scale = _stored(right, dtype, dim=1)
    right = stored_right.double() * right_scale
    seen = weighted(right, metric)
    inverse = torch.linalg.pinv(right @ seen.T, rtol=_NEGLIGIBLE, hermitian=True)
    left = left + (error.double() - left @ right) @ seen.T @ inverse
    stored_left, left_scale = _stored(left, dtype, dim=0)
    scales = (left_scale.flatten() * right_scale.flatten()).float() if dtype == "int8" else None
    return LowRank(stored_left.contiguous(), stored_right.contiguous(), scales)


def _stored(factor: torch.Tensor, dtype: str, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A factor as it is stored, and what that is to be multiplied by: one number for each vector along ``dim``."""
    if dtype != "int8":
        return factor.to(DTYPES[dtype]), factor.new_ones(())
    scale = factor.abs().amax(dim, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (factor / scale).round().to(torch.int8), scale
