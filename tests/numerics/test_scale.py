from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.numerics import Grid, QTensor, apply_scales, choose_scales, grid, group_view

NF4 = Grid(
    "nf4-like",
    4,
    torch.tensor([-1.0, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0]),
)
TABLES = [*(grid(f"int{bits}") for bits in range(2, 9)), NF4]
each_table = pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
each_scheme = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
each_search = pytest.mark.parametrize("search", [True, False], ids=["searched", "absmax"])


def gaussian(rows: int, columns: int, seed: int = 0, power: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** power


def rounded(weight: torch.Tensor, table: Grid, granularity="channel", **how) -> QTensor:
    """Scales as asked for, then the nearest codes."""
    scales = choose_scales(weight, table, granularity, **how)
    return QTensor.of(apply_scales(weight, table, scales), scales, table)


def group_errors(weight: torch.Tensor, q: QTensor, granularity, importance=None) -> torch.Tensor:
    """Squared error of each group ``[rows, groups]``, weighted, in float64."""
    error = (weight.double() - q.dequantize().double()).square()
    if importance is not None:
        error = error * importance.double()
    return group_view(error, granularity).sum(-1)


@st.composite
def layers(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor | None, int | str]:
    """A weight of any shape and tail, an importance or none, and a granularity that fits."""
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    size = draw(st.sampled_from([1, 2, 7, 16]))
    seed, power = draw(st.integers(0, 10**6)), draw(st.sampled_from([1, 2, 3]))
    weight = gaussian(rows, groups * size, seed, power) * 10.0 ** draw(st.integers(-4, 3))
    if draw(st.booleans()):
        weight[gaussian(*weight.shape, seed + 1) < 0] = 0
    importance = draw(st.sampled_from([None, 1, 6]))
    if importance is not None:
        importance = gaussian(1, groups * size, seed + 2)[0].abs() ** importance + 1e-6
        importance[: draw(st.integers(0, 2))] = 0
    return weight, importance, draw(st.sampled_from([size, "channel", "tensor"]))


@settings(deadline=None, max_examples=150)
@given(layers(), st.sampled_from(TABLES), st.booleans())
def test_the_search_is_never_worse_than_absmax(layer, table, symmetric):
    weight, importance, granularity = layer
    how = {"symmetric": symmetric, "importance": importance}
    searched = rounded(weight, table, granularity, search=True, **how)
    plain = rounded(weight, table, granularity, search=False, **how)
    before = group_errors(weight, plain, granularity, importance)
    after = group_errors(weight, searched, granularity, importance)
    nothing = QTensor(plain.codes, 0 * plain.scales, None, table)
    energy = group_errors(weight, nothing, granularity, importance)
    # The search compares what errors leave of the energy, in float32: smaller differences are lost.
    assert torch.all(after <= before * (1 + 1e-4) + 2e-6 * energy)


def best_of_500(weight: torch.Tensor, table: Grid, importance: torch.Tensor) -> torch.Tensor:
    """The least error of each row under 500 symmetric scales of either sign."""
    w = weight.double()
    unit = w.abs().amax(-1, keepdim=True) / abs(table.extreme)
    best = torch.full((len(w),), torch.inf, dtype=torch.float64)
    for factor in torch.linspace(0.4, 1.6, 250).tolist():
        for scale in (unit * factor, unit * -factor):
            error = (table.round(w / scale) * scale - w).square() @ importance.double()
            best = torch.minimum(best, error)
    return best


# The margin is what a sweep of ten steps costs: nothing where scales matter, more where steps are fine.
@pytest.mark.parametrize(
    ("table", "margin"),
    [(grid("int2"), 1.01), (grid("int3"), 1.01), (grid("int4"), 1.02), (NF4, 1.02), (grid("int5"), 1.08)],
    ids=["int2", "int3", "int4", "nf4-like", "int5"],
)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("power", [1, 3])
def test_five_hundred_scales_hardly_beat_the_search(table, margin, weighted, power):
    weight = gaussian(300, 32, seed=power, power=power)
    importance = gaussian(1, 32, seed=9).square()[0] if weighted else torch.ones(32)
    q = rounded(weight, table, importance=importance)
    error = group_errors(weight, q, "channel", importance).sum()
    assert error <= margin * best_of_500(weight, table, importance).sum()


@pytest.mark.parametrize("table", [grid("int2"), grid("int3"), grid("int4")], ids=lambda table: table.name)
def test_a_sweep_of_ranges_hardly_beats_the_asymmetric_search(table):
    """Against every pair of 60 scales and 60 zeros: the search keeps the zero and shrinks the range."""
    weight = gaussian(60, 32, seed=3).double() + 0.7
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    span = table.highest - table.lowest
    best = torch.full((len(weight),), torch.inf, dtype=torch.float64)
    for factor in torch.linspace(0.5, 1.2, 60).tolist():
        scale = (high - low) * factor / span
        for shift in torch.linspace(-0.3, 0.3, 60).tolist():
            zero = (table.lowest - low / scale + shift * span).round().clamp(table.lowest, table.highest)
            decoded = (table.round(weight / scale + zero) - zero) * scale
            best = torch.minimum(best, (decoded - weight).square().sum(1))
    q = rounded(weight.float(), table, symmetric=False)
    assert group_errors(weight.float(), q, "channel").sum() <= 1.15 * best.sum()


@pytest.mark.parametrize("table", [grid("nf3"), NF4, grid("e2m1"), grid("power4:0.5")], ids=lambda table: table.name)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("offset", "power"), [(0.0, 1), (0.7, 1), (0.0, 3)])
def test_thousands_of_ranges_hardly_beat_a_tables_asymmetric_search(table, weighted, offset, power):
    """A table's zero lies anywhere: against every range that cuts up to a half from either end."""
    weight = gaussian(60, 32, seed=4, power=power).double() + offset
    importance = gaussian(1, 32, seed=5).square()[0] if weighted else torch.ones(32)
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    best = torch.full((len(weight),), torch.inf, dtype=torch.float64)
    cuts = torch.linspace(-0.15, 0.5, 45).tolist()
    for below, above in ((below, above) for below in cuts for above in cuts if below + above < 0.8):
        start, stop = low + (high - low) * below, high - (high - low) * above
        scale = (stop - start) / (table.highest - table.lowest)
        zero = table.lowest - start / scale
        decoded = (table.round(weight / scale + zero) - zero) * scale
        best = torch.minimum(best, (decoded - weight).square() @ importance.double())
    q = rounded(weight.float(), table, symmetric=False, importance=importance if weighted else None)
    found = group_errors(weight.float(), q, "channel", importance).sum()
    # Weighted, some ten of 32 inputs count, and among thousands of ranges one fits those few.
    assert found <= (1.25 if weighted else 1.15) * best.sum()
    assert (
        found
        < 0.9
        * group_errors(
            weight.float(), rounded(weight.float(), table, symmetric=False, search=False), "channel", importance
        ).sum()
    )


@each_table
@pytest.mark.parametrize("sign", [1, -1])
def test_absmax_puts_the_largest_weight_on_the_extreme(table, sign):
    weight = gaussian(8, 24, seed=1)
    weight[torch.arange(8), torch.arange(8)] = sign * 9.0
    q = rounded(weight, table, search=False)
    ends_alike = -table.lowest == table.highest  # then a scale has no reason to be negative
    extreme = int(table.nearest(torch.tensor(sign * table.highest if ends_alike else table.extreme)))
    assert q.codes[torch.arange(8), torch.arange(8)].tolist() == [extreme] * 8
    torch.testing.assert_close(q.dequantize()[torch.arange(8), torch.arange(8)], torch.full((8,), 9.0 * sign))
    assert q.zeros is None


def test_the_search_uses_both_directions_of_a_lopsided_grid():
    """[-1, 1] cannot use the full range of -2..1 one way; -8/7 on one side fits only with one sign."""
    for extremes in ((8.0, -7.0), (-8.0, 7.0)):
        weight = torch.tensor([[*extremes, 1.0, 2.0, -3.0]])
        assert torch.equal(rounded(weight, grid("int4")).dequantize(), weight)
    skew = torch.tensor([[1.0, 0.72, 0.56, 0.44, 0.34, -0.09]])  # NF4's own entries, either way round
    for weight in (skew, -skew):
        torch.testing.assert_close(rounded(weight, NF4).dequantize(), weight)


@each_table
@each_scheme
@each_search
def test_a_group_of_zeros_stays_zero(table, symmetric, search):
    weight = torch.cat([torch.zeros(3, 8), gaussian(3, 8)], dim=1)
    q = rounded(weight, table, 8, symmetric=symmetric, search=search)
    assert torch.equal(q.scales[:, 0], torch.ones(3))
    assert torch.count_nonzero(q.dequantize()[:, :8]) == 0
    assert q.dequantize().isfinite().all()


@each_scheme
@each_search
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-8, 1e-3, 1.0, 1e4, 1e6, 1e12, 1e20, 1e30])
def test_stored_scales_are_finite_and_not_zero(dtype, size, symmetric, search):
    weight = gaussian(4, 16, seed=2) * size
    q = rounded(weight, grid("int4"), 8, stored=str(dtype).split(".")[1], symmetric=symmetric, search=search)
    assert q.scales.dtype == dtype
    assert q.scales.isfinite().all()
    assert torch.count_nonzero(q.scales) == q.scales.numel()
    assert q.dequantize().isfinite().all()
    if 1e-3 <= size <= 1e4 or (dtype != torch.float16 and size <= 1e12):
        torch.testing.assert_close(q.dequantize() / size, weight / size, rtol=0, atol=0.25)


def test_codes_are_chosen_for_the_scale_as_stored():
    """int8 in bfloat16: rounding the scale moves the outer entries by half a step; the codes must follow."""
    weight = gaussian(64, 256, seed=4)
    q = rounded(weight, grid("int8"), stored="bfloat16", search=False)
    steps = (weight / q.scales.float()).round().clamp(-128, 127) + 128
    assert torch.equal(q.codes, steps.to(torch.uint8))


@each_scheme
def test_importance_moves_error_to_where_it_costs_less(symmetric):
    weight = gaussian(200, 32, seed=5)
    importance = torch.where(torch.arange(32) < 4, 1000.0, 1.0)
    how = {"symmetric": symmetric}
    blind = rounded(weight, grid("int3"), **how)
    seeing = rounded(weight, grid("int3"), importance=importance, **how)
    weighted = [group_errors(weight, q, "channel", importance).sum() for q in (blind, seeing)]
    assert weighted[1] < (0.5 if symmetric else 0.9) * weighted[0]
    assert group_errors(weight, seeing, "channel").sum() > group_errors(weight, blind, "channel").sum()
    alike = rounded(weight, grid("int3"), importance=torch.ones(32), **how)
    assert torch.equal(alike.codes, blind.codes)


@each_scheme
def test_inputs_that_never_count_leave_absmax(symmetric):
    weight = gaussian(4, 8)
    how = {"symmetric": symmetric, "granularity": 4}
    scales, *_ = choose_scales(weight, grid("int4"), importance=torch.zeros(8), **how)
    absmax, *_ = choose_scales(weight, grid("int4"), search=False, **how)
    if symmetric:
        assert torch.equal(scales, absmax)
    assert scales.isfinite().all()


@each_scheme
@pytest.mark.parametrize(
    ("granularity", "shape"),
    [(4, (6, 4)), (16, (6, 1)), (1, (6, 16)), ("channel", (6, 1)), ("tensor", (1, 1))],
)
def test_shapes(granularity, shape, symmetric):
    weight = gaussian(6, 16)
    chosen = choose_scales(weight, grid("int4"), granularity, symmetric=symmetric, stored="float16")
    scales, zeros, _ = chosen
    assert scales.shape == shape
    if symmetric:
        assert zeros is None
    else:
        assert zeros.shape == shape
        assert zeros.dtype == torch.int8
    codes = apply_scales(weight, grid("int4"), chosen)
    assert codes.shape == weight.shape
    assert codes.dtype == torch.uint8


def test_zeros_of_a_table_are_stored_like_its_scales():
    zeros = choose_scales(gaussian(2, 8), NF4, "channel", symmetric=False, stored="bfloat16").zeros
    assert zeros.dtype == torch.bfloat16


@each_scheme
@each_search
def test_each_group_has_a_scale_of_its_own(symmetric, search):
    """A group's scale is what it would be alone; per tensor is one group over everything."""
    weight = gaussian(5, 24, seed=6, power=3)
    importance = gaussian(1, 24, seed=7).square()[0]
    how = {"symmetric": symmetric, "search": search}
    scales, zeros, _ = choose_scales(weight, grid("int4"), 8, importance=importance, **how)
    for row in range(5):
        for group in range(3):
            at = slice(8 * group, 8 * group + 8)
            part = weight[row : row + 1, at].contiguous()
            alone, zero, _ = choose_scales(part, grid("int4"), "channel", importance=importance[at], **how)
            torch.testing.assert_close(scales[row, group], alone[0, 0])
            assert zeros is None or zeros[row, group] == zero[0, 0]
    whole, *_ = choose_scales(weight, grid("int4"), "tensor", importance=importance, **how)
    flat, *_ = choose_scales(weight.reshape(1, -1), grid("int4"), "channel", importance=importance.repeat(5), **how)
    torch.testing.assert_close(whole, flat)


def test_a_long_weight_is_searched_in_pieces_without_a_trace():
    weight = gaussian(700, 256, seed=8)  # more than one piece
    scales, *_ = choose_scales(weight, grid("int4"), "channel")
    for row in (0, 511, 512, 513, 699):
        alone, *_ = choose_scales(weight[row : row + 1], grid("int4"), "channel")
        torch.testing.assert_close(scales[row : row + 1], alone)


@each_table
@each_search
@pytest.mark.parametrize("offset", [0.0, 1.0, 5.0, -5.0])
def test_asymmetric_integers_decode_zero_exactly(table, search, offset):
    weight = gaussian(20, 16, seed=9) + offset
    weight[:, ::5] = 0
    q = rounded(weight, table, 8, symmetric=False, search=search)
    if table.is_integer:
        assert torch.count_nonzero(q.dequantize()[:, ::5]) == 0
    # One step at most, where the range is not cut: nothing saturates at the far end.
    if not search:
        step = q.scales.repeat_interleave(8, 1) * table.values.diff().max()
        assert torch.all((q.dequantize() - weight).abs() <= step * (1 + 1e-4))


@each_table
@pytest.mark.parametrize("offset", [5.0, -5.0])
def test_asymmetric_ranges_reach_every_weight_far_from_zero(table, offset):
    """The range of weights that are all of one sign begins at zero, or their far end would be cut off."""
    weight = gaussian(20, 16, seed=13) + offset
    q = rounded(weight, table, 8, symmetric=False, search=False)
    step = q.scales.repeat_interleave(8, 1) * table.values.diff().max()
    assert torch.all((q.dequantize() - weight).abs() <= step * (1 + 1e-4))


def test_asymmetric_gains_on_one_sided_weights():
    weight = gaussian(50, 32, seed=10).abs()
    one_sided, signed = (
        group_errors(weight, rounded(weight, grid("int4"), symmetric=symmetric), "channel").sum()
        for symmetric in (False, True)
    )
    assert one_sided < 0.4 * signed


@settings(deadline=None, max_examples=60)
@given(layers(), st.sampled_from(TABLES), st.integers(-20, 20), st.booleans(), st.booleans())
def test_scales_follow_the_weights(layer, table, exponent, symmetric, search):
    """Twice the weights: twice the scales, the same codes and zeros, bit by bit."""
    weight, importance, granularity = layer
    how = {"symmetric": symmetric, "search": search, "importance": importance}
    one = rounded(weight, table, granularity, **how)
    other = rounded(weight * 2.0**exponent, table, granularity, **how)
    assert torch.equal(other.codes, one.codes)
    zero = group_view(weight, granularity).abs().amax(-1) == 0
    assert torch.equal(other.scales, torch.where(zero, one.scales, one.scales * 2.0**exponent))
    assert one.zeros is None or torch.equal(other.zeros, one.zeros)


@each_table
def test_codes_are_the_nearest_entries_under_the_scale(table):
    """Against a loop over rows, groups and entries."""
    weight = gaussian(3, 12, seed=11)
    q = rounded(weight, table, 4, symmetric=False)
    entries = (table.values.double() - q.zeros.double()[..., None]) * q.scales.double()[..., None]
    for row in range(3):
        for column in range(12):
            distance = (entries[row, column // 4] - weight[row, column].double()).abs()
            assert distance[int(q.codes[row, column])] <= distance.min() + 1e-6


def test_the_weight_is_not_written_to():
    weight = gaussian(4, 8)
    before = weight.clone()
    for symmetric in (True, False):
        rounded(weight, grid("int4"), 4, symmetric=symmetric, importance=torch.ones(8))
    assert torch.equal(weight, before)


def test_eight_bits_are_nearly_exact():
    weight = gaussian(32, 256, seed=12)
    error = group_errors(weight, rounded(weight, grid("int8")), "channel").sum()
    assert error < 1e-4 * weight.double().square().sum()
