from __future__ import annotations

import re

import pytest
import torch
from synthetic import NF4, TableScheme, inputs, moment_statistics, output_error, problem, statistics, weights

from quantlab.errors import MissingStatisticsError, RecipeError
from quantlab.numerics import apply_scales, choose_scales
from quantlab.problem import InputStatistics, Statistic
from quantlab.quantizers import Quantizer, make_quantizer, quantizer_names
from quantlab.quantizers.gptq import Gptq
from quantlab.quantizers.rtn import Rtn
from quantlab.recipe import Scheme

W = weights(24, 64)
KEPT = statistics(inputs(500, 64))
SCHEMES = [
    Scheme(granularity=16),
    Scheme(format="int3", granularity="channel", symmetric=False),
    Scheme(granularity="tensor", scale_search="absmax"),
    TableScheme(table=NF4, granularity=16),
    TableScheme(table=NF4, granularity=16, symmetric=False),
]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_weight_gets_the_nearest_entry_under_its_scale(scheme):
    q = Rtn().quantize(problem(W, KEPT), scheme).qtensor
    table = scheme.grid_for(W, None)
    importance = KEPT.diagonal if scheme.scale_search == "second-moment" else None
    scales = choose_scales(
        W,
        table,
        scheme.granularity,
        symmetric=scheme.symmetric,
        search=scheme.scale_search != "absmax",
        importance=importance,
        stored="bfloat16",
    )
    assert torch.equal(q.scales, scales.scales)
    assert torch.equal(q.codes, apply_scales(W, table, scales))
    assert q.grid is table
    far = (W - q.dequantize()).abs()
    inner = (q.codes > 0) & (q.codes < len(q.grid) - 1)
    scale = q.scales.float().abs().repeat_interleave(64 // q.scales.shape[1], 1)
    half_step = scale * q.grid.values.diff().max() / 2
    assert torch.all(far[inner] <= half_step.expand_as(far)[inner] * 1.0001)


def test_the_second_moment_weights_the_search():
    x = inputs(500, 64)
    seeing, blind, absmax = (
        output_error(W, Rtn().quantize(problem(W, KEPT), Scheme(format="int3", scale_search=search)), x)
        for search in ("second-moment", "mse", "absmax")
    )
    assert seeing < blind < absmax


def test_needs():
    assert Rtn().needs(Scheme(scale_search="second-moment")) == Statistic.DIAGONAL
    assert Rtn().needs(Scheme(scale_search="mse")) == Statistic.NONE
    assert Rtn().needs(Scheme(scale_search="absmax")) == Statistic.NONE


@pytest.mark.parametrize("kept", [None, InputStatistics(5)])
def test_a_missing_diagonal_is_named_with_the_layer(kept):
    with pytest.raises(MissingStatisticsError, match=r"model\.layers\.3\.mlp\.down_proj: needs diagonal"):
        Rtn().quantize(problem(W, kept), Scheme())
    for search in ("mse", "absmax"):
        Rtn().quantize(problem(W, kept), Scheme(scale_search=search))


def test_no_token_counts_all_inputs_alike():
    none = Rtn().quantize(problem(W, InputStatistics(0)), Scheme())
    alike = Rtn().quantize(problem(W, None), Scheme(scale_search="mse"))
    assert torch.equal(none.qtensor.codes, alike.qtensor.codes)
    unseen = Rtn().quantize(problem(W, moment_statistics(torch.zeros(64, 64), tokens=0)), Scheme())
    assert torch.equal(unseen.qtensor.codes, alike.qtensor.codes)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_twice_changes_nothing(scheme):
    once = Rtn().quantize(problem(W, KEPT), scheme).qtensor.dequantize()
    twice = Rtn().quantize(problem(once, KEPT), scheme).qtensor.dequantize()
    # Asymmetric: what was cut off is not there a second time, so that the range may differ.
    assert (twice - once).norm() < (0.01 if scheme.symmetric else 0.05) * once.norm()


# --- the registry ---


def test_methods_are_made_by_name():
    assert {"gptq", "rtn"} <= set(quantizer_names())
    assert make_quantizer("rtn", {}) == Rtn()
    assert make_quantizer("gptq", {"damping": 0.5, "order": "natural"}) == Gptq(damping=0.5, order="natural")
    for name in quantizer_names():
        assert make_quantizer(name, {}).name == name


@pytest.mark.parametrize("name", quantizer_names())
def test_every_method_solves_a_plain_problem(name):
    """What the engine relies on, of whatever is registered."""
    method: Quantizer = make_quantizer(name, {})
    scheme = Scheme(granularity=16, symmetric=name != "hqq")
    assert isinstance(method.needs(scheme), Statistic)
    before = W.clone()
    solution = method.quantize(problem(W, KEPT), scheme)
    assert solution.qtensor.shape == W.shape
    assert solution.qtensor.codes.dtype == torch.uint8
    assert solution.qtensor.scales.dtype == torch.bfloat16
    assert (solution.qtensor.dequantize() - W).norm() < 0.5 * W.norm()
    assert solution.loss is None or solution.loss.shape == (24,)
    assert torch.equal(W, before)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gptqq", {}, "quantizer 'gptqq' is unknown; use one of .*gptq, .*rtn"),
        ("gptq", {"dampin": 1}, "quantizer 'gptq' has no option 'dampin'; its options are damping, order"),
        ("rtn", {"order": "natural"}, "quantizer 'rtn' has no option 'order'; it has no options"),
        ("gptq", {1: 2}, "has no option 1"),
    ],
)
def test_what_cannot_be_made_is_refused(name, options, message):
    with pytest.raises(RecipeError) as caught:
        make_quantizer(name, options)
    assert re.search(message, str(caught.value))
