"""The search for scales, against a naive one."""

from __future__ import annotations

import math

import pytest
import torch

from quantlab.errors import RecipeError
from quantlab.problem import InputStatistics, LayerProblem
from quantlab.quantizers import make_quantizer
from quantlab.recipe import Scheme
from quantlab.transforms import Awq, Reader, make_transform

INT3 = Scheme(format="int3", granularity=16, scale_search="absmax", scale_dtype="float32")


def layer(rows=24, width=64, tokens=96, seed=0):
    """A weight, and inputs of which a few channels are much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.ones(width)
    size[torch.randperm(width, generator=generator)[:4]] = 30
    return torch.randn(rows, width, generator=generator), torch.randn(tokens, width, generator=generator) * size


def error(weight, x, scheme, scales=None):
    """Of the rounded layer's output, by the rounding method itself."""
    scales = torch.ones(weight.shape[1]) if scales is None else scales
    statistics = InputStatistics(len(x), diagonal=(x / scales).square().mean(0))
    problem = LayerProblem("layer", weight * scales, statistics)
    rounded = make_quantizer("rtn", {}).quantize(problem, scheme).qtensor.dequantize()
    return float(((x / scales) @ rounded.T - x @ weight.T).square().sum())


def naive(weights, x, scheme, steps):
    """One exponent after the other, channel by channel."""
    width = x.shape[1]
    magnitude = [sum(abs(float(v)) for v in x[:, j]) / len(x) for j in range(width)]
    best, chosen = sum(error(weight, x, scheme) for weight in weights), None
    for step in range(1, steps):
        raw = [magnitude[j] ** (step / steps) for j in range(width)]
        scales = torch.tensor([s / math.sqrt(max(raw) * min(raw)) for s in raw])
        now = sum(error(weight, x, scheme, scales) for weight in weights)
        if now < best:
            best, chosen = now, scales
    return chosen


@pytest.mark.parametrize(
    "scheme",
    [
        INT3,
        Scheme(format="e3m2", granularity="channel", scale_search="mse"),
        Scheme(format="int4", granularity=32, symmetric=False, scale_search="absmax"),
        Scheme(format="nf4", granularity=16, scale_search="absmax", scale_dtype="e4m3"),
    ],
    ids=["int3", "e3m2", "asymmetric", "nf4"],
)
def test_is_the_paper_s_search(scheme):
    (first, x), (second, _) = layer(), layer(rows=40, seed=1)
    expected = naive([first, second], x, scheme, 8)
    actual = Awq(steps=8).search([Reader(first, x, scheme), Reader(second, x, scheme)], torch.arange(64), 64)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)
    assert float(actual.max() * actual.min()) == pytest.approx(1, rel=1e-4)


def test_outlier_channels_are_worth_it():
    weight, x = layer()
    scales = Awq().search([Reader(weight, x, INT3)], torch.arange(64), 64)
    assert error(weight, x, INT3, scales) < 0.5 * error(weight, x, INT3)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scheme", [INT3, Scheme(format="int2", granularity="channel", scale_search="second-moment")])
def test_is_never_worse_than_to_leave_them(scheme, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(16, 32, generator=generator), torch.randn(40, 32, generator=generator)
    scales = Awq().search([Reader(weight, x, scheme)], torch.arange(32), 32)
    if scales is not None:
        assert error(weight, x, scheme, scales) < error(weight, x, scheme)


def test_large_layers_are_searched_by_some_outputs_and_judged_by_all(monkeypatch):
    weight, x = layer(rows=60)
    whole = Awq(steps=6).search([Reader(weight, x, INT3)], torch.arange(64), 64)
    monkeypatch.setattr("quantlab.transforms.awq._ROWS", 20)
    part = Awq(steps=6).search([Reader(weight, x, INT3)], torch.arange(64), 64)
    torch.testing.assert_close(part, naive([weight[::3]], x, INT3, 6), rtol=1e-4, atol=0)
    assert error(weight, x, INT3, part) < error(weight, x, INT3)
    assert error(weight, x, INT3, whole) <= error(weight, x, INT3, part)
    exact = torch.randint(-4, 4, weight.shape, generator=torch.Generator().manual_seed(0)).float()
    exact[:, ::16] = -4
    exact[::3] = weight[::3] * 1e-3  # the outputs that are looked at would gain, all others would lose
    assert Awq().search([Reader(exact, x, INT3)], torch.arange(64), 64) is None


def test_leaves_alone_what_is_exact_already():
    weight = torch.randint(-4, 4, (8, 32), generator=torch.Generator().manual_seed(0)).float()
    weight[:, ::16] = -4
    assert Awq().search([Reader(weight, layer(width=32)[1], INT3)], torch.arange(32), 32) is None


def test_heads_that_share_values_share_scales():
    weight, x = layer(width=64)
    channels = 4 + torch.arange(16).view(2, 1, 8).expand(2, 4, 8).reshape(-1)  # 4 channels in front go elsewhere
    scales = Awq().search([Reader(weight, x, INT3)], channels, 20)
    assert scales.shape == (20,)
    assert torch.equal(scales[:4], torch.ones(4))
    mean = torch.zeros(16)
    for j, channel in enumerate(channels.tolist()):
        mean[channel - 4] += x[:, j].abs().mean() / 4
    assert torch.equal(scales[4:].argsort(), mean.argsort())


def test_inputs_that_are_never_on_get_a_finite_scale():
    weight, x = layer()
    x[:, 5] = 0
    scales = Awq().search([Reader(weight, x, INT3)], torch.arange(64), 64)
    assert scales.isfinite().all()
    assert float(scales.min()) > 0


def test_sixteen_bits_are_searched_in_float32():
    weight, x = layer()
    weight, x = weight.bfloat16(), x.bfloat16()
    half = Awq(steps=6).search([Reader(weight, x, INT3)], torch.arange(64), 64)
    full = Awq(steps=6).search([Reader(weight.float(), x.float(), INT3)], torch.arange(64), 64)
    torch.testing.assert_close(half, full, rtol=1e-3, atol=0)


@pytest.mark.parametrize("options", [{"steps": 1}, {"tokens": 0}, {"tokens": 1.5}, {"steps": True}, {"alpha": 1}])
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(RecipeError, match="awq"):
        make_transform("awq", options)
    with pytest.raises(RecipeError, match=r"transform 'awk' is unknown; use one of .*awq"):
        make_transform("awk", {})
