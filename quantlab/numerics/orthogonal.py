"""Orthogonal matrices that spread what they are multiplied with: Hadamard matrices and rotations made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


def hadamard(order: int) -> torch.Tensor | None:
    """A Hadamard matrix: entries +-1, rows orthogonal, first row and first column all ones.

    Sylvester's doubling, and Paley's two constructions (J. Math. and Phys. 12, 1933) over prime fields: powers of two,
    12, 20, 24, 28, 36, 44, 60 and many more, each times powers of two.

    Returns:
        float64 ``[order, order]``, or None where none is known here (92, and whatever 4 does not divide).
    """
    known = _known(order)
    return None if known is None else torch.kron(_sylvester(known[0]), known[1])


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix ``Q`` of random signs ``D`` and a Kronecker product ``M = A x B``: quickly applied.

    Attributes:
        signs: the diagonal of ``D``, float64 ``[width]``.
        left: ``A``, float64.
        right: ``B``, float64.
        two_sided: ``Q = M D M^T``; otherwise ``Q = D M``.
    """

    signs: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    two_sided: bool

    @property
    def width(self) -> int:
        """Of the vectors that it rotates."""
        return len(self.signs)

    @property
    def matrix(self) -> torch.Tensor:
        """``Q``, float64 ``[width, width]``."""
        return self.apply(torch.eye(self.width, dtype=torch.float64))

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``x Q`` along the last dimension, part by part where that is several times as wide as the rotation.

        Args:
            x: float64 ``[..., n * width]``, on any device.
        """
        rows = x.reshape(-1, self.width)
        signs, left, right = (part.to(x.device) for part in (self.signs, self.left, self.right))
        if self.two_sided:
            rows = self._product(rows, left, right)
        rows = rows * signs
        if self.two_sided:
            return self._product(rows, left.T, right.T).reshape(x.shape)
        return self._product(rows, left, right).reshape(x.shape)

    @staticmethod
    def _product(rows: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (left.T @ (rows.view(-1, len(left), len(right)) @ right)).flatten(1)


def rotation(width: int, seed: int, *, keep_ones: bool = False) -> Rotation:
    """A randomized Hadamard matrix over ``sqrt(width)``, the same for the same seed; orthogonal for every width.

    Where the width has no known Hadamard matrix it is the Kronecker product of the largest power of two and a random
    orthogonal matrix of the odd rest. Random signs make it one of many (QuaRot, arXiv:2404.00456, section 3).

    Args:
        width: of the vectors to be rotated.
        seed: of the signs, and of the random part.
        keep_ones: map the vector of all ones to itself, so that the mean of a vector is kept too, and a LayerNorm
            commutes with the rotation as an RMSNorm does. The entries then are not all of one size.
    """
    generator = torch.Generator().manual_seed(seed)
    # M's first column is constant: M takes the first unit vector to the ones, and its transpose takes it back.
    twos, core = _known(width) or (width & -width, None)
    if core is None:
        core = _random_orthogonal(width // twos, generator)
    outer = min(twos, 1 << round(math.log2(width) / 2))  # both factors about as large
    left, right = _sylvester(outer), torch.kron(_sylvester(twos // outer), core)
    signs = torch.randint(0, 2, (width,), generator=generator, dtype=torch.float64) * 2 - 1
    if keep_ones:
        signs[0] = 1
    return Rotation(signs, left / outer**0.5, right / right[:, 0].norm(), keep_ones)


def _random_orthogonal(width: int, generator: torch.Generator) -> torch.Tensor:
    """A random orthogonal matrix but for its first column, which is constant."""
    q, r = torch.linalg.qr(torch.randn(width - 1, width - 1, generator=generator, dtype=torch.float64))
    inner = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), q * r.diagonal().sign())
    # The Householder reflection that takes the first unit vector to the ones.
    axis = torch.full((width,), -(width**-0.5), dtype=torch.float64)
    axis[0] += 1
    return inner - 2 * torch.outer(axis, axis @ inner) / (axis @ axis)


def _known(order: int) -> tuple[int, torch.Tensor] | None:
    """A power of two and a matrix to be doubled so often, as seldom as can be."""
    for twos in range((order & -order).bit_length()):
        core = _core(order >> twos)
        if core is not None:
            return 1 << twos, core
    return None


def _sylvester(order: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(pair, matrix)
    return matrix


def _core(order: int) -> torch.Tensor | None:
    """A Hadamard matrix that is not doubled: of order 1 or 2, or Paley's."""
    if order in (1, 2):
        return _sylvester(order)
    if order % 4 == 0 and _is_prime(order - 1):  # a multiple of 4: the prime is 3 modulo 4
        matrix = torch.eye(order, dtype=torch.float64) + _bordered(order - 1, -1)
    elif order % 8 == 4 and _is_prime(order // 2 - 1):  # the prime is 1 modulo 4
        pair, other = [[1, 1], [1, -1]], [[1, -1], [-1, -1]]
        matrix = torch.kron(_bordered(order // 2 - 1, 1), torch.tensor(pair, dtype=torch.float64))
        matrix += torch.kron(torch.eye(order // 2, dtype=torch.float64), torch.tensor(other, dtype=torch.float64))
    else:
        return None
    matrix = matrix * matrix[:1]
    return matrix * matrix[:, :1]


def _bordered(prime: int, corner: int) -> torch.Tensor:
    """Paley's conference matrix: the quadratic characters of all differences, with a border of ones."""
    squares = torch.full((prime,), -1.0, dtype=torch.float64)
    squares[torch.arange(prime) ** 2 % prime] = 1
    squares[0] = 0
    index = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1, corner
    matrix[1:, 1:] = squares[(index[:, None] - index) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
