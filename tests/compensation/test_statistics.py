from __future__ import annotations

import pytest
import torch
from layers import autoregressive, problem, statistics

from quantlab.compensation import make_compensation
from quantlab.errors import RecipeError
from quantlab.numerics import QTensor, Scales, grid
from quantlab.problem import InputStatistics, Solution, Statistic
from quantlab.quantizers import make_quantizer
from quantlab.recipe import Scheme

RTN = make_quantizer("rtn", {})
SCHEME = Scheme(format="int2", granularity=16, scale_dtype="float32")


class Exact:
    """A rounding method whose codes are the weights: integers under a scale of 1."""

    def quantize(self, problem, scheme):
        table = grid("int4")
        scales = Scales(torch.ones(len(problem.weight), 1), None)
        return Solution(QTensor.of(table.nearest(problem.weight), scales, table))


@pytest.fixture(scope="module")
def x():
    generator = torch.Generator().manual_seed(1)
    return 2 + autoregressive(4000, 64, 0.8, generator) * torch.logspace(-0.5, 0.5, 64) + torch.linspace(-1, 1, 64)


@pytest.fixture(scope="module")
def weight():
    return 0.05 * torch.randn(24, 64, generator=torch.Generator().manual_seed(0)) + 0.02


def outputs(solution, x):
    bias = 0 if solution.bias is None else solution.bias.double()
    return x @ solution.qtensor.dequantize().double().T + bias


def test_needs():
    assert make_compensation("bias", {}).needs(SCHEME) == Statistic.MEAN
    assert make_compensation("statistics", {}).needs(SCHEME) == Statistic.MEAN | Statistic.SECOND_MOMENT


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_bias_restores_the_mean(rounding, weight, x):
    given = problem(weight, statistics(x))
    plain = make_quantizer(rounding, {}).quantize(given, SCHEME)
    solution = make_compensation("bias", {}).solve(given, SCHEME, make_quantizer(rounding, {}))
    wanted = (x @ weight.double().T).mean(0)
    torch.testing.assert_close(outputs(solution, x).mean(0), wanted, rtol=1e-4, atol=1e-5)
    assert float((outputs(plain, x).mean(0) - wanted).abs().max()) > 1e-2
    assert torch.equal(solution.qtensor.dequantize(), plain.qtensor.dequantize())


def test_bias_leaves_less_error(weight, x):
    given = problem(weight, statistics(x))
    wanted = x @ weight.double().T
    plain, repaired = (
        (outputs(solution, x) - wanted).square().sum(0)
        for solution in (RTN.quantize(given, SCHEME), make_compensation("bias", {}).solve(given, SCHEME, RTN))
    )
    assert bool((repaired <= plain * (1 + 1e-6)).all())


@pytest.mark.parametrize("scheme", [SCHEME, Scheme(format="int2", granularity="channel", symmetric=False)])
def test_statistics_restores_mean_and_variance(scheme, weight, x):
    given = problem(weight, statistics(x))
    solution = make_compensation("statistics", {}).solve(given, scheme, RTN)
    plain = RTN.quantize(given, scheme)
    wanted, found = x @ weight.double().T, outputs(solution, x)
    loose = 1e-4 if scheme.scale_dtype == "float32" else 2**-7  # as exact as a scale is stored
    torch.testing.assert_close(found.mean(0), wanted.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.var(0), wanted.var(0), rtol=loose, atol=0)
    assert float((outputs(plain, x).var(0) / wanted.var(0) - 1).abs().max()) > 0.05
    assert torch.equal(solution.qtensor.codes, plain.qtensor.codes)
    assert solution.qtensor.scales.dtype == plain.qtensor.scales.dtype


def test_statistics_holds_on_other_inputs_to_sampling_error(weight, x):
    solution = make_compensation("statistics", {}).solve(problem(weight, statistics(x[:2000])), SCHEME, RTN)
    wanted, found = x[2000:] @ weight.double().T, outputs(solution, x[2000:])
    spread = wanted.std(0)
    assert float(((found.mean(0) - wanted.mean(0)).abs() / spread).max()) < 0.1
    assert float((found.std(0) / spread - 1).abs().max()) < 0.1


@pytest.mark.parametrize("method", ["bias", "statistics"])
def test_nothing_changes_where_nothing_was_lost(method, x):
    weight = torch.randint(-7, 8, (12, 64), generator=torch.Generator().manual_seed(3)).float()
    given = problem(weight, statistics(x))
    solution = make_compensation(method, {}).solve(given, SCHEME, Exact())
    torch.testing.assert_close(solution.qtensor.dequantize(), weight)
    torch.testing.assert_close(solution.bias, torch.zeros(12), rtol=0, atol=1e-3)


def test_rows_without_variance_keep_their_scales(weight, x):
    weight = weight.clone()
    weight[3] = 0
    solution = make_compensation("statistics", {}).solve(problem(weight, statistics(x)), SCHEME, RTN)
    plain = RTN.quantize(problem(weight, statistics(x)), SCHEME)
    assert torch.equal(solution.qtensor.scales[3], plain.qtensor.scales[3])
    assert solution.qtensor.dequantize().isfinite().all()
    assert solution.bias[3] == 0


@pytest.mark.parametrize("method", ["bias", "statistics"])
def test_no_token_is_said(method, weight):
    solution = make_compensation(method, {}).solve(problem(weight, InputStatistics(0)), SCHEME, RTN)
    assert solution.bias is None
    assert "could not be corrected" in solution.notes[-1]


@pytest.mark.parametrize("changes", [{"scale_dtype": kind} for kind in ("e8m0", "e4m3", "int8", "dynamic8")])
def test_scales_that_cannot_hold_the_factor_are_refused(changes):
    with pytest.raises(RecipeError, match=rf"scale_dtype {changes['scale_dtype']} cannot hold.*use bfloat16"):
        make_compensation("statistics", {}).needs(Scheme(**changes))


def test_one_scale_for_all_is_refused():
    with pytest.raises(RecipeError, match="granularity 'tensor' has one for all"):
        make_compensation("statistics", {}).needs(Scheme(granularity="tensor"))
