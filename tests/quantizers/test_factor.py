"""The triangular factor of a damped second moment."""

from __future__ import annotations

import pytest
import torch
from gptq_problems import (
    COLUMNS,
    X,
)
from synthetic import (
    statistics,
)

from quantlab.problem import PIECE
from quantlab.quantizers.factor import factorize


@pytest.mark.parametrize("damping", [1e-6, 0.01, 1.0])
def test_the_factor_is_that_of_the_damped_moment(damping):
    moment = statistics(X).second_moment
    factor, taken = factorize(moment, damping)
    assert taken == damping
    assert torch.equal(factor, factor.triu())
    assert torch.all(factor.diagonal() > 0)
    damped = moment.double() + damping * moment.diagonal().double().mean() * torch.eye(COLUMNS)
    product = factor.double() @ factor.double().T
    torch.testing.assert_close(product, damped, rtol=1e-5, atol=1e-6 * float(damped.max()))


class Waiting:
    """A matrix on a disk, which remembers how it is read."""

    def __init__(self, size: int) -> None:
        self.rows, self.shape, self.reads = torch.zeros(size, size), torch.Size((size, size)), []

    def __getitem__(self, rows: slice) -> torch.Tensor:
        self.reads.append(rows.indices(len(self.rows))[:2])
        return self.rows[rows].clone()

    def __setitem__(self, rows: slice, values: torch.Tensor) -> None:
        self.rows[rows] = values


def test_a_moment_that_waits_on_the_disk_is_read_in_ranges_whatever_the_order():
    size = PIECE + 40
    moment = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    moment = moment @ moment.T / size
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    expected, _ = factorize(moment, 0.01, order)
    spare, own = Waiting(size), moment.clone()
    found, _ = factorize(own, 0.01, order, spare)
    assert torch.equal(found, expected)
    assert found.data_ptr() == own.data_ptr()
    assert torch.equal(spare.rows, moment)
    assert spare.reads == [(0, PIECE), (PIECE, size)]
