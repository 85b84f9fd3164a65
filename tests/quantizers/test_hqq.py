from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import array, inputs, problem, statistics, weights

from quantlab.errors import RecipeError
from quantlab.nn import QuantLinear
from quantlab.numerics import QTensor, choose_scales, decode_scales, grid, group_view
from quantlab.problem import Statistic
from quantlab.quantizers.hqq import Hqq
from quantlab.quantizers.rtn import Rtn
from quantlab.recipe import Scheme
from quantlab.storage import Storage

HOW = {"symmetric": False, "scale_search": "absmax", "quantizer": "hqq"}
W = weights(32, 128)


def norm(weight: torch.Tensor, q: QTensor, granularity: int | str, p: float = 0.7) -> torch.Tensor:
    """``sum |w - q|^p`` of each group, in steps of the group, float64."""
    off = group_view((weight - q.dequantize()).double(), granularity)
    return (off / decode_scales(q.scales, q.outer).double().unsqueeze(-1)).abs().pow(p).sum(-1)


def naive(weight: np.ndarray, scale: float, zero: float, grid: np.ndarray, method: Hqq) -> float:
    """One group, one weight at a time, its zero not rounded."""

    def look(at: float) -> tuple[list[float], list[float], float]:
        nearest = [float(grid[np.abs(grid - (w / scale + at)).argmin()]) for w in weight]
        off = [w / scale - (v - at) for w, v in zip(weight, nearest, strict=True)]
        return nearest, off, sum(abs(o) ** method.p for o in off)

    best, best_error, beta = zero, float("inf"), method.beta
    for _ in range(method.iterations + 1):
        nearest, off, error = look(zero)
        if error >= best_error:
            break
        best, best_error = zero, error
        shrunk = [np.sign(o) * max(abs(o) - abs(o) ** (method.p - 1) / beta, 0) if o else 0.0 for o in off]
        zero = float(np.mean([v - (w / scale - e) for v, w, e in zip(nearest, weight, shrunk, strict=True)]))
        beta *= method.kappa
    return best


@pytest.mark.parametrize("name", ["int4", "int2", "nf4"])
@pytest.mark.parametrize("method", [Hqq(), Hqq(p=1.0, beta=3.0), Hqq(p=0.5, kappa=1.1, iterations=3)])
def test_zeros_are_those_of_a_naive_loop(name, method):
    """Where float32 rounds a weight to the other side, the zero moves by a fraction of the group's size."""
    weight = weights(1, 32, seed=5)
    scheme = Scheme(format=name, granularity="channel", scale_dtype="float32", **HOW)
    q = method.quantize(problem(weight, None), scheme).qtensor
    start = choose_scales(weight, grid(name), "channel", symmetric=False, search=False)
    expected = naive(array(weight)[0], float(start.scales), float(start.zeros), array(grid(name).values), method)
    assert float(q.zeros) == pytest.approx(expected, abs=5e-3)
    assert torch.equal(q.scales, start.scales)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["int2", "int3", "int4", "int8", "nf4", "e2m1"]),
    st.sampled_from([16, 64, "channel", "tensor"]),
    st.sampled_from(["float32", "bfloat16", "float16", "int8"]),
    st.sampled_from(["absmax", "mse"]),
    st.integers(0, 10**6),
)
def test_no_group_gets_worse(name, granularity, stored, search, seed):
    weight = weights(8, 64, seed).pow(3 if seed % 2 else 1) * 2.0 ** (seed % 7)
    scheme = Scheme(format=name, granularity=granularity, scale_dtype=stored, **(HOW | {"scale_search": search}))
    q = Hqq().quantize(problem(weight, None), scheme).qtensor
    before = Rtn().quantize(problem(weight, None), scheme).qtensor
    assert torch.equal(q.scales, before.scales)
    assert torch.all(norm(weight, q, granularity) <= norm(weight, before, granularity) * (1 + 1e-3) + 1e-4)


@pytest.mark.parametrize("name", ["int2", "int3", "int4"])
def test_it_is_better_than_min_max(name):
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(5.0).sample((64, 512)) * 0.02
    scheme = Scheme(format=name, **HOW)
    after, before = (method.quantize(problem(weight, None), scheme).qtensor for method in (Hqq(), Rtn()))
    assert float(norm(weight, after, 64).sum()) < 0.97 * float(norm(weight, before, 64).sum())
    squares = [float((weight - q.dequantize()).square().sum()) for q in (after, before)]
    assert squares[0] < 0.97 * squares[1]


@pytest.mark.parametrize(("stored", "kept"), [("float32", "float32"), ("float16", "float16"), ("e4m3", "bfloat16")])
def test_zeros_of_integers_are_stored_as_numbers(stored, kept):
    q = Hqq().quantize(problem(W, None), Scheme(granularity=32, scale_dtype=stored, **HOW)).qtensor
    assert str(q.zeros.dtype) == f"torch.{kept}"
    assert torch.any(q.zeros.float() != q.zeros.float().round())
    storage = Storage.of(q)
    assert storage.zero_dtype == kept
    layer = QuantLinear.from_qtensor(q)
    assert torch.equal(layer.to_qtensor().dequantize(), q.dequantize())
    x = inputs(5, 128)
    torch.testing.assert_close(layer(x), x @ q.dequantize().T, rtol=1e-4, atol=1e-4)


def test_the_size_of_weights_does_not_matter():
    scheme = Scheme(granularity=32, scale_dtype="float32", **HOW)
    one, other = (Hqq().quantize(problem(w, None), scheme).qtensor for w in (W, W * 2.0**-20))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.zeros, other.zeros)


def test_groups_of_zeros_stay_zero():
    weight = W.clone()
    weight[:, :32] = 0
    q = Hqq().quantize(problem(weight, None), Scheme(granularity=32, **HOW)).qtensor
    assert torch.count_nonzero(q.dequantize()[:, :32]) == 0


def test_needs_nothing_but_zeros():
    assert Hqq().needs(Scheme(**HOW)) == Statistic.NONE
    assert Hqq().needs(Scheme(**(HOW | {"scale_search": "mse"}))) == Statistic.NONE
    weighted = Scheme(**(HOW | {"scale_search": "second-moment"}))
    assert Hqq().needs(weighted) == Statistic.DIAGONAL
    Hqq().quantize(problem(W, statistics(inputs(100, 128))), weighted)
    with pytest.raises(RecipeError, match=r"hqq: finds zeros, .* use symmetric: false"):
        Hqq().needs(Scheme(quantizer="hqq"))


@pytest.mark.parametrize(
    "options",
    [{"p": 0}, {"p": 1.5}, {"p": "x"}, {"beta": 0}, {"beta": -1}, {"kappa": 0.9}, {"iterations": 0}, {"p": True}],
)
def test_options_are_checked(options):
    with pytest.raises(RecipeError, match=f"hqq: {next(iter(options))} "):
        Hqq(**options)
