"""GPTQ on inputs that are few, never on, not finite or without memory of their own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gptq_problems import (
    COLUMNS,
    ROWS,
    SCHEMES,
    W,
    X,
    each_order,
    each_scheme,
    solve,
)
from synthetic import (
    inputs,
    moment_statistics,
    output_error,
    problem,
    statistics,
    weights,
)

from quantlab.errors import QuantlabError
from quantlab.numerics import QTensor
from quantlab.quantizers.rtn import Rtn
from quantlab.recipe import Scheme


@each_scheme
@each_order
@pytest.mark.parametrize("tokens", [1, 5, COLUMNS - 1])
def test_fewer_tokens_than_inputs(scheme, order, tokens):
    x = inputs(tokens, COLUMNS)
    solution = solve(x=statistics(x), scheme=scheme, order=order)
    assert solution.qtensor.dequantize().isfinite().all()
    assert solution.loss.isfinite().all()
    assert torch.all(solution.loss >= 0)
    if scheme.granularity != "tensor":
        rtn = Rtn().quantize(problem(W, statistics(x)), scheme)
        assert output_error(W, solution, x) < output_error(W, rtn, x)


def test_damping_rises_until_the_factorization_succeeds_and_says_so():
    """An eigenvalue is at -0.1 of the mean: of 0.015, 0.03, ... 0.12 is the first that is enough."""
    basis = torch.linalg.qr(weights(COLUMNS, COLUMNS, seed=5).double())[0]
    eigenvalues = torch.linspace(0.5, 1.5, COLUMNS, dtype=torch.float64)
    eigenvalues *= (COLUMNS + 0.1) / eigenvalues[1:].sum()
    eigenvalues[0] = -0.1
    moment = (basis * eigenvalues @ basis.T).float()
    solution = solve(x=moment_statistics(moment), damping=0.015)
    assert solution.notes == ("damping raised to 0.12",)
    assert solution.qtensor.dequantize().isfinite().all()
    assert solve(x=moment_statistics(moment), damping=0.2).notes == ()


@pytest.mark.timeout(10)
@each_order
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_refused_with_the_layers_name(order, value):
    moment = statistics(X).second_moment
    moment[3, 3] = value
    with pytest.raises(QuantlabError, match=r"model\.layers\.3\.mlp\.down_proj"):
        solve(x=moment_statistics(moment), order=order)


@each_scheme
@each_order
def test_zeros_everywhere(scheme, order):
    nothing = torch.zeros(COLUMNS, COLUMNS)
    solution = solve(torch.zeros_like(W), statistics(X), scheme, order=order)
    assert solution.qtensor.dequantize().abs().max() < 1e-6
    solution = solve(W, moment_statistics(nothing), scheme, order=order)
    assert solution.qtensor.dequantize().isfinite().all()
    assert torch.count_nonzero(solution.loss) == 0


@pytest.mark.parametrize("scheme", [SCHEMES["channel"], Scheme(granularity=8, symmetric=False)], ids=str)
@each_order
def test_inputs_that_are_never_on(scheme, order):
    """Their weights are free: zero. The others are rounded as if those were not there."""
    dead = torch.arange(COLUMNS) % 8 == 5
    weight = W.clone()
    weight[:, dead] = 100.0  # must not stretch anybody's scale
    x = X.clone()
    x[:, dead] = 0
    solution = solve(weight, statistics(x), scheme, order=order, damping=0.02)
    assert torch.count_nonzero(solution.qtensor.dequantize()[:, dead]) == 0
    if scheme.granularity == "channel":
        living = solve(W[:, ~dead], statistics(x[:, ~dead]), scheme, order=order, damping=0.02 * 28 / 32)
        assert torch.equal(solution.qtensor.codes[:, ~dead], living.qtensor.codes)
        torch.testing.assert_close(solution.loss, living.loss, rtol=1e-3, atol=0)
    else:
        same = solve(torch.where(dead, 0, W), statistics(x), scheme, order=order, damping=0.02)
        assert torch.equal(solution.qtensor.codes, same.qtensor.codes)


@each_scheme
@each_order
def test_what_is_on_the_grid_stays_there(scheme, order):
    table = scheme.grid_for(W, None)
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, len(table), (ROWS, COLUMNS), generator=generator, dtype=torch.uint8)
    codes[:, ::8] = 0
    codes[:, 1::8] = len(table) - 1
    groups = 4 if scheme.granularity == 8 else 1
    shape = (1, 1) if scheme.granularity == "tensor" else (ROWS, groups)
    scales = torch.rand(shape, generator=generator).add(0.5).bfloat16()
    weight = QTensor(codes, scales, None if scheme.symmetric else torch.zeros(shape), table).dequantize()
    solution = solve(weight, statistics(X), scheme, order=order)
    torch.testing.assert_close(solution.qtensor.dequantize(), weight, rtol=1e-4, atol=1e-4)
    assert output_error(weight, solution, X) < 1e-8


@each_order
@pytest.mark.parametrize("symmetric", [True, False])
def test_eight_bits_are_nearly_exact(order, symmetric):
    scheme = Scheme(format="int8", granularity="channel", symmetric=symmetric)
    assert output_error(W, solve(scheme=scheme, order=order), X) < 1e-4


@each_order
def test_the_same_problem_gives_the_same_bits(order):
    one, other = (solve(order=order).qtensor for _ in range(2))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales, other.scales)


def test_arguments_are_not_written_to():
    kept = statistics(X, original=inputs(400, COLUMNS, seed=1))
    before = [tensor.clone() for tensor in (W, kept.second_moment, kept.shift)]
    solve(x=kept, asym=1.0)
    for tensor, copy in zip((W, kept.second_moment, kept.shift), before, strict=True):
        assert torch.equal(tensor, copy)


@each_order
@pytest.mark.parametrize("asym", [0.0, 1.0])
def test_the_moments_own_memory_will_do(order, asym):
    """With a spare place for it the answer is the same, and so is the moment; also where damping is raised."""
    kept = statistics(X, original=inputs(400, COLUMNS, seed=1))
    singular = kept.second_moment - 0.2 * torch.eye(COLUMNS)  # not positive definite at first
    for moment, notes in ((kept.second_moment, 0), (singular, 1)):
        known = dataclasses.replace(kept, second_moment=moment, held_out_shift=kept.shift, held_out=0.2)
        expected = solve(x=known, order=order, asym=asym)
        assert len(expected.notes) == notes
        before, spare = moment.clone(), torch.full_like(moment, torch.nan)
        found = solve(x=dataclasses.replace(known, spare=spare), order=order, asym=asym)
        assert torch.equal(found.qtensor.codes, expected.qtensor.codes)
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(moment, before)
        assert spare.isfinite().all()
