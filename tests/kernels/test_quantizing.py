"""The compiled kernels that make quantized weights, against definitions in float64 and against torch's operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantlab_kernels import native, quantizing

from quantlab.numerics import Grid, Scales, apply_scales, choose_scales, grid

pytestmark = pytest.mark.skipif(native.best_isa() != "avx512", reason="needs AVX-512")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GRIDS = [grid(name) for name in ("int2", "int3", "int4", "int8", "nf3", "nf4", "e2m1", "e2m3", "e3m2", "e4m3", "nf8")]
FACTORS = [0.8, 1.0, 1.25, -0.8, -1.0]


@pytest.fixture
def call_in_torch(monkeypatch):
    """Call something without the compiled kernels."""

    def call(function, *arguments, **more):
        with monkeypatch.context() as without:
            without.setattr(quantizing, "_has_kernel", lambda *_: False)
            return function(*arguments, **more)

    return call


def weight_of(rows: int, groups: int, size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, groups, size, generator=generator) ** 3 * 10.0 ** (seed % 5 - 2)).to(dtype)


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """A weight of any shape, of a few types, some of it zeros."""
    rows, groups = draw(st.integers(1, 20)), draw(st.integers(1, 4))
    size = draw(st.sampled_from([1, 3, 15, 16, 17, 32, 64, 100]))
    weight = weight_of(rows, groups, size, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 10**6)))
    if draw(st.booleans()):
        weight[0, 0] = 0
    return weight


def steps_for(weight: torch.Tensor, table: Grid) -> torch.Tensor:
    """Scales that use most of the table, none of them 0."""
    return (weight.float().abs().amax(-1) / table.highest * 0.9).clamp(min=1e-3)


@settings(deadline=None, max_examples=100)
@given(weights())
def test_peaks_are_the_first_of_the_largest(weight):
    flat = weight.double().numpy()
    at = np.abs(flat).argmax(-1, keepdims=True)
    expected = np.take_along_axis(flat, at, -1)[..., 0]
    assert quantizing.group_peaks(weight).double().numpy().tolist() == expected.tolist()


def test_of_two_peaks_the_first_counts():
    weight = torch.tensor([[[0.5, -2.0, 1.0, 2.0] * 8, [2.0, -2.0] * 16]])
    assert quantizing.group_peaks(weight).tolist() == [[-2.0, 2.0]]


@settings(deadline=None, max_examples=150)
@given(weights(), st.sampled_from(GRIDS), st.booleans())
def test_codes_are_those_of_the_nearest_entries(weight, table, zeros):
    scales = steps_for(weight, table)
    shift = (scales * 7).round() % 3 if zeros else None
    codes = quantizing.nearest_codes(weight, scales, shift, table.values, table.borders)
    scaled = weight.float() / scales.unsqueeze(-1) + (0 if shift is None else shift.unsqueeze(-1))
    distances = (scaled.double().unsqueeze(-1) - table.values.double()).abs()
    found = distances.gather(-1, codes.long().unsqueeze(-1)).squeeze(-1)
    # What lies between two entries is up to the grid's rule for ties; borders are rounded to float32.
    assert (found <= distances.amin(-1) + scaled.double().abs() * 2.0**-22 + 1e-12).all()
    assert torch.equal(codes, table.nearest(scaled))


@pytest.mark.parametrize("table", GRIDS, ids=lambda table: table.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_gets_a_code_and_infinities_the_ends(table, dtype):
    weight = torch.tensor([[[float("nan"), float("inf"), -float("inf"), 0.0]]], dtype=dtype)
    codes = quantizing.nearest_codes(weight, torch.ones(1, 1), None, table.values, table.borders)
    assert codes.flatten()[:3].tolist() == [0, len(table) - 1, 0]


@settings(deadline=None, max_examples=100)
@given(weights(), st.sampled_from(GRIDS), st.booleans(), st.booleans())
def test_errors_are_sums_of_squares(weight, table, zeros, weighted):
    scales = steps_for(weight, table)
    shift = (scales * 7).round() % 3 if zeros else None
    codes = torch.randint(0, len(table), weight.shape, dtype=torch.uint8)
    importance = torch.rand(weight[0].numel()) + 0.1 if weighted else None
    errors, energies = quantizing.row_errors(weight, codes, scales, shift, table.values, importance)
    units = table.values.double()[codes.long()] - (0 if shift is None else shift.double().unsqueeze(-1))
    counts = torch.ones(weight[0].numel()) if importance is None else importance
    w = weight.double()
    off = (w - units * scales.double().unsqueeze(-1)).square().flatten(1) @ counts.double()
    torch.testing.assert_close(errors.double(), off, rtol=1e-5, atol=0)
    torch.testing.assert_close(energies.double(), w.square().flatten(1) @ counts.double(), rtol=1e-5, atol=0)


def test_what_is_represented_exactly_has_no_error():
    table = grid("int4")
    codes = torch.randint(0, 16, (5, 2, 33), dtype=torch.uint8)
    scales = torch.rand(5, 2) + 0.3
    weight = table.values[codes.long()] * scales.unsqueeze(-1)
    errors, _ = quantizing.row_errors(weight, codes, scales, None, table.values, None)
    assert errors.eq(0).all()


@settings(deadline=None, max_examples=100)
@given(weights(), st.sampled_from(GRIDS), st.booleans())
def test_of_the_scales_that_are_tried_the_best_is_fitted_to_its_codes(weight, table, weighted):
    importance = torch.rand(weight[0].numel()) + 0.1 if weighted else torch.ones(weight[0].numel())
    start = steps_for(weight, table)
    start[0, 0] = 0
    given = importance if weighted else None
    found = quantizing.search_scales(weight, start, table.values, table.borders, given, FACTORS, 0).double()
    inverse, counts = torch.where(start == 0, 0, 1 / start), importance.view(weight[0].shape).double()
    gains, fits = [], []
    for factor in FACTORS:
        v = table.round(weight.float() * (inverse * factor).unsqueeze(-1)).double()
        dot, norm = (weight.double() * v * counts).sum(-1), (v * v * counts).sum(-1)
        gains.append(torch.where(norm > 0, dot.square() / norm, 0))
        fits.append(torch.where(norm > 0, dot / norm, start))
    gain, fit = torch.stack(gains), torch.stack(fits)
    # Sums are float32, so of two that are as good either may be taken.
    good = (gain >= gain.amax(0) * (1 - 1e-4)) & ((found - fit).abs() <= 1e-4 * fit.abs() + 1e-12)
    assert good.any(0).all()


@settings(deadline=None, max_examples=50)
@given(weights(), st.sampled_from(GRIDS))
def test_going_on_from_the_best_makes_nothing_worse(weight, table):
    start = steps_for(weight, table)

    def gains(refits):
        scales = quantizing.search_scales(weight, start, table.values, table.borders, None, FACTORS, refits)
        v = table.round(weight.float() / torch.where(scales == 0, 1, scales).unsqueeze(-1)).double()
        dot, norm = (weight.double() * v).sum(-1), v.square().sum(-1)
        return torch.where(norm > 0, dot.square() / norm, 0)

    energy = weight.double().square().sum(-1)
    # What is compared are the codes of the scale that was found: those of one refit more.
    assert (gains(3) >= gains(1) - 1e-4 * energy).all()


@pytest.mark.parametrize("table", GRIDS, ids=lambda table: table.name)
@pytest.mark.parametrize("granularity", [16, 40, "channel", "tensor"])
@pytest.mark.parametrize("weighted", [True, False])
def test_scales_and_codes_are_those_of_torch(call_in_torch, table, granularity, weighted):
    weight = weight_of(12, 1, 80, torch.float32, 3).flatten(1)
    importance = torch.rand(80) + 0.1 if weighted else None
    plain = choose_scales(weight, table, granularity, search=False)
    expected = call_in_torch(choose_scales, weight, table, granularity, search=False)
    assert torch.equal(plain.scales, expected.scales)
    assert torch.equal(apply_scales(weight, table, plain), call_in_torch(apply_scales, weight, table, plain))
    searched = choose_scales(weight, table, granularity, importance=importance)
    expected = call_in_torch(choose_scales, weight, table, granularity, importance=importance)

    def errors(scales: Scales) -> torch.Tensor:
        codes = call_in_torch(apply_scales, weight, table, scales)
        decoded = table.values[codes.long()].view(12, scales.scales.shape[1], -1) * scales.scales.unsqueeze(-1)
        off = (decoded.flatten(1) - weight).double().square()
        return off if importance is None else off * importance

    # The search compares sums of the weights' own size, in float32: of errors that are tiny beside them it sees less.
    energy = float((weight.double().square() * (1 if importance is None else importance)).sum())
    assert float(errors(searched).sum()) == pytest.approx(float(errors(expected).sum()), rel=1e-3, abs=1e-6 * energy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_as_stored_is_quantized_as_its_float32_copy(call_in_torch, dtype):
    weight = weight_of(9, 4, 48, dtype, 4).flatten(1)
    for table in (grid("int4"), grid("nf4")):
        for search in (False, True):
            for call in (lambda function, *given, **more: function(*given, **more), call_in_torch):
                as_stored = call(choose_scales, weight, table, 48, search=search)
                copied = call(choose_scales, weight.float(), table, 48, search=search)
                assert torch.equal(as_stored.scales, copied.scales)
                codes = call(apply_scales, weight, table, as_stored)
                assert torch.equal(codes, call(apply_scales, weight.float(), table, as_stored))


def test_the_result_does_not_depend_on_threads():
    weight = weight_of(67, 6, 128, torch.bfloat16, 5)
    table = grid("nf4")

    def results():
        peaks = quantizing.group_peaks(weight)
        found = quantizing.search_scales(weight, peaks, table.values, table.borders, None, FACTORS, 2)
        codes = quantizing.nearest_codes(weight, found, None, table.values, table.borders)
        errors = quantizing.row_errors(weight, codes, found, None, table.values, None)
        return [peaks, found, codes, *errors, quantizing.packed(codes.flatten(1), 5, 480)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        torch.set_num_threads(3)
        together = results()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64, 131])
def test_packs_as_torch_does(call_in_torch, bits, columns):
    from quantlab_kernels import pack

    codes = torch.randint(0, 1 << bits, (5, columns), dtype=torch.uint8)
    assert torch.equal(pack(codes, bits), call_in_torch(pack, codes, bits))


def test_rows_of_a_view_are_read_where_they_are():
    weight = weight_of(40, 2, 32, torch.bfloat16, 6)
    assert torch.equal(quantizing.group_peaks(weight[7:20]), quantizing.group_peaks(weight)[7:20])
    turned = weight.transpose(0, 1)
    assert torch.equal(quantizing.group_peaks(turned), quantizing.group_peaks(weight).T)


@pytest.mark.parametrize(
    "weight", [torch.empty(0, 1, 8), torch.ones(1, 1, 8, dtype=torch.float64)], ids=["empty", "f64"]
)
def test_there_is_no_kernel_for_everything(weight):
    assert quantizing.group_peaks(weight) is None
