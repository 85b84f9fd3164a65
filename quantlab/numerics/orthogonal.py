"""Orthogonal matrices that spread what they are multiplied with: Hadamard matrices and rotations made of them."""

from __future__ import annotations

import torch


def hadamard(order: int) -> torch.Tensor | None:
    """A Hadamard matrix: entries +-1, rows orthogonal, first row and first column all ones.

    Sylvester's doubling, and Paley's two constructions (J. Math. and Phys. 12, 1933) over prime fields: powers of two,
    12, 20, 24, 28, 36, 44, 60 and many more, each times powers of two.

    Returns:
        float64 ``[order, order]``, or None where none is known here (92, and whatever 4 does not divide).
    """
    for twos in range((order & -order).bit_length()):  # doubled as few times as can be
        core = _core(order >> twos)
        if core is not None:
            return torch.kron(_sylvester(1 << twos), core)
    return None


def rotation(width: int, seed: int, *, keep_ones: bool = False) -> torch.Tensor:
    """A randomized Hadamard matrix over ``sqrt(width)``, the same for the same seed; orthogonal for every width.

    Where the width has no known Hadamard matrix it is the Kronecker product of the largest power of two and a random
    orthogonal matrix of the odd rest. Random signs make it one of many (QuaRot, arXiv:2404.00456, section 3).

    Args:
        width: of the vectors to be rotated.
        seed: of the signs, and of the random part.
        keep_ones: map the vector of all ones to itself, so that the mean of a vector is kept too, and a LayerNorm
            commutes with the rotation as an RMSNorm does. The entries then are not all of one size.

    Returns:
        ``Q``, float64 ``[width, width]``; a row vector ``x`` is rotated as ``x @ Q``.
    """
    generator = torch.Generator().manual_seed(seed)
    base = _base(width, generator)
    signs = torch.randint(0, 2, (width,), generator=generator, dtype=torch.float64) * 2 - 1
    if not keep_ones:
        return signs[:, None] * base
    signs[0] = 1  # the base takes its first unit vector to the ones, and its transpose takes it back
    return (base * signs) @ base.T


def _base(width: int, generator: torch.Generator) -> torch.Tensor:
    """An orthogonal matrix whose first column is constant."""
    if (known := hadamard(width)) is not None:
        return known / width**0.5
    twos = width & -width
    return torch.kron(_sylvester(twos) / twos**0.5, _random_orthogonal(width // twos, generator))


def _random_orthogonal(width: int, generator: torch.Generator) -> torch.Tensor:
    """A random orthogonal matrix but for its first column, which is constant."""
    q, r = torch.linalg.qr(torch.randn(width - 1, width - 1, generator=generator, dtype=torch.float64))
    inner = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), q * r.diagonal().sign())
    # The Householder reflection that takes the first unit vector to the ones.
    axis = torch.full((width,), -(width**-0.5), dtype=torch.float64)
    axis[0] += 1
    return inner - 2 * torch.outer(axis, axis @ inner) / (axis @ axis)


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
