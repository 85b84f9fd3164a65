"""The error that is reported of each output: a naive reference, and that nothing is computed that is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantlab.engine import solve
from quantlab.numerics import QTensor, apply_scales, choose_scales, grid
from quantlab.problem import InputStatistics, Solution

ROWS, COLUMNS = 37, 64


@pytest.fixture
def problem(monkeypatch):
    """A weight, its rounding, and what is known of its inputs; pieces of 8 rows, the last of 5."""
    monkeypatch.setattr(solve, "_ROWS", 8)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    scales = choose_scales(weight, grid("int4"), 32)
    qtensor = QTensor.of(apply_scales(weight, grid("int4"), scales), scales, grid("int4"))
    x = torch.randn(200, COLUMNS, generator=generator) + 0.3
    return weight, qtensor, InputStatistics(200, second_moment=x.T @ x / 200, mean=x.mean(0)), x


def naive(weight, off, x):
    """Mean squares of each output of a weight that is ``off``, and of the weight itself, by running both."""
    return (x @ off.T).square().mean(0), (x @ weight.T).square().mean(0)


def test_errors_and_energies_are_those_of_outputs(problem):
    weight, qtensor, statistics, x = problem
    losses, energies, metric = solve._row_errors(weight, Solution(qtensor), statistics)
    expected = naive(weight, weight - qtensor.dequantize(), x)
    assert metric == "output"
    torch.testing.assert_close((losses, energies), expected, rtol=1e-4, atol=1e-5)


def test_a_bias_takes_its_part_of_the_error(problem):
    weight, qtensor, statistics, x = problem
    off = weight - qtensor.dequantize()
    bias = off @ statistics.mean
    losses, _, _ = solve._row_errors(weight, Solution(qtensor, bias=bias), statistics)
    torch.testing.assert_close(losses, (x @ off.T - bias).square().mean(0), rtol=1e-4, atol=1e-5)


def test_what_a_method_knows_is_not_computed_again(problem, monkeypatch):
    """Nor is the weight decoded for it: beside a wide moment that takes the memory of a run's peak."""
    weight, qtensor, statistics, x = problem
    known = torch.arange(ROWS).float()
    monkeypatch.setattr(QTensor, "decoded_rows", lambda *_: pytest.fail("decoded"))
    losses, energies, _ = solve._row_errors(weight, Solution(qtensor, loss=known), statistics)
    assert torch.equal(losses, known)
    torch.testing.assert_close(energies, naive(weight, weight, x)[1], rtol=1e-4, atol=1e-5)


def test_without_a_moment_errors_are_of_weights(problem):
    weight, qtensor, statistics, _ = problem
    off = weight - qtensor.dequantize()
    diagonal = statistics.second_moment.diagonal()
    losses, _, metric = solve._row_errors(weight, Solution(qtensor), None)
    assert metric == "weight"
    torch.testing.assert_close(losses, off.square().sum(1))
    weighted = replace(statistics, second_moment=None, diagonal=diagonal)
    losses, _, metric = solve._row_errors(weight, Solution(qtensor), weighted)
    assert metric == "weighted"
    torch.testing.assert_close(losses, (off.square() * diagonal).sum(1))
