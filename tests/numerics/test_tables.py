from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.numerics import Grid, format_called, grid

# Formats that have a type of their own elsewhere, which says what each pattern is and how to round.
TYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
MINIFLOATS = {**dict.fromkeys(TYPES), **dict.fromkeys(("e2m2", "e3m1", "e1m2", "e4m1", "e5m1", "e6m0", "e3m3", "e4m2"))}
each_minifloat = pytest.mark.parametrize("name", MINIFLOATS)


def split(name: str) -> tuple[int, int]:
    return int(name[1]), int(name[3])


def magnitudes(name: str) -> list[float]:
    """The numbers without a sign, one for each pattern in order, by the definition."""
    exponent, mantissa = split(name)
    bias = 2 ** (exponent - 1) - 1
    found = []
    for pattern in range(2 ** (exponent + mantissa)):
        power, fraction = divmod(pattern, 2**mantissa)
        if name == "e4m3" and pattern == 2**7 - 1:
            continue  # not a number
        if name == "e5m2" and power == 2**5 - 1:
            continue  # infinity and not a number
        found.append(
            math.ldexp(fraction, 1 - bias - mantissa)
            if power == 0
            else math.ldexp(2**mantissa + fraction, power - bias - mantissa)
        )
    return found


def ties_to_even(x: float, values: list[float]) -> float:
    """The nearest of the numbers without a sign, by comparing all; of two the one whose pattern is even."""
    near = min(range(len(values)), key=lambda k: (abs(abs(x) - values[k]), k % 2))
    return math.copysign(values[near], x)


@each_minifloat
def test_minifloats_are_the_numbers_of_their_patterns(name):
    expected = magnitudes(name)
    both = sorted({sign * value for value in expected for sign in (-1, 1)})
    assert grid(name).values.tolist() == both
    assert grid(name).bits == 1 + sum(split(name))


@pytest.mark.parametrize("name", TYPES)
def test_minifloats_are_those_of_ml_dtypes(name):
    dtype = TYPES[name]
    patterns = np.arange(2 ** grid(name).bits, dtype=np.uint8).view(dtype).astype(np.float32)
    assert grid(name).values.tolist() == sorted(set(patterns[np.isfinite(patterns)].tolist()) - {-0.0} | {0.0})


def probes(table: Grid) -> torch.Tensor:
    """Random numbers of every size, all entries, everything halfway, and the floats beside it."""
    generator = torch.Generator().manual_seed(0)
    uniform = (torch.rand(50_000, generator=generator) * 2.4 - 1.2) * table.highest
    small = torch.randn(50_000, generator=generator) * table.values.diff().min() * 4
    half = (table.values[1:].double() + table.values[:-1].double()).div(2).float()
    beside = [torch.nextafter(half, torch.full_like(half, end)) for end in (-torch.inf, torch.inf)]
    return torch.cat([uniform, small, half, *beside, table.values])


@pytest.mark.parametrize("name", TYPES)
def test_minifloats_round_as_ml_dtypes_casts(name):
    """Saturated first: beyond the end the 8-bit types become infinite or no number at all."""
    table = grid(name)
    x = probes(table)
    expected = x.clamp(table.lowest, table.highest).numpy().astype(TYPES[name]).astype(np.float32)
    assert table.round(x).tolist() == expected.tolist()
    assert torch.equal(table.values[table.nearest(x).long()], table.round(x))


@each_minifloat
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_minifloats_round_to_the_nearest_and_ties_to_even(name, data):
    table, values = grid(name), magnitudes(name)
    half = st.sampled_from(((table.values[1:].double() + table.values[:-1].double()) / 2).tolist())
    near = st.floats(-1.5 * table.highest, 1.5 * table.highest, width=32)
    x = data.draw(st.one_of(near, half.filter(lambda value: float(np.float32(value)) == value)))
    assert float(table.round(torch.tensor(x))) == ties_to_even(x, values)


def test_the_ends_of_the_minifloats():
    ends = {"e2m1": 6, "e3m2": 28, "e2m3": 7.5, "e2m2": 7, "e3m1": 24, "e4m3": 448, "e5m2": 57344}
    assert {name: grid(name).highest for name in ends} == ends
    assert len(grid("e3m2")) == len(grid("e2m3")) == 63
    assert grid("e3m2").values[32:].tolist() == [
        *(0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75, 2),
        *(2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28),
    ]


@pytest.mark.parametrize("bits", range(2, 9))
def test_narrow_integers_are_the_power_of_one(bits):
    narrow, power = grid(f"int{bits}-narrow"), grid(f"power{bits}:1")
    assert len(narrow) == 2**bits - 1
    assert narrow.is_integer
    assert torch.equal(narrow.values, power.values)
    x = torch.randn(1000, generator=torch.Generator().manual_seed(bits)) * narrow.highest
    assert torch.equal(narrow.nearest(x), power.nearest(x))
    assert torch.equal(narrow.round(x), power.round(x))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("exponent", [0.1, 0.35, 0.5, 0.77, 1.0])
def test_power_grids_are_odd_and_end_where_integers_do(bits, exponent):
    table = grid(f"power{bits}:{exponent}")
    assert torch.equal(table.values, -table.values.flip(0))
    assert (table.highest, float(table.values[len(table) // 2])) == (2 ** (bits - 1) - 1, 0)
    assert len(table) == 2**bits - 1
    # What they decode: the sign of q times (|q| s)^(1/a).
    q = torch.arange(len(table)) - len(table) // 2
    step = table.highest**exponent / table.highest
    expected = (q.abs() * step) ** (1 / exponent) * q.sign()
    torch.testing.assert_close(table.values, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("exponent", [0.35, 0.5, 0.77])
def test_products_are_kept_by_the_power(exponent):
    """f(xy) = f(x) f(y): the product of two decoded numbers is the decoded product."""
    table = grid(f"power4:{exponent}")
    unit = (table.values.double() / table.highest).float()
    q = (torch.arange(15) - 7).double() / 7
    products = torch.outer(q, q)
    decoded = products.abs().pow(1 / exponent) * products.sign()
    torch.testing.assert_close(torch.outer(unit, unit).double(), decoded, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_floats_have_zero_and_both_ends(bits):
    table = grid(f"nf{bits}")
    assert len(table) == 2**bits
    assert (table.lowest, table.highest) == (-1, 1)
    assert 0 in table.values.tolist()
    assert int((table.values > 0).sum()) == 2 ** (bits - 1)
    steps = table.values.diff()
    middle = int((table.values == 0).nonzero())
    assert torch.all(steps[middle:].diff() > 0), "wider and wider"
    assert torch.all(steps[:middle].diff() < 0)


def test_nf4_is_what_the_quantiles_say():
    """The stored numbers are the quantiles of QLoRA's appendix, computed with less care."""
    offset = 0.9677083
    normal = torch.distributions.Normal(0.0, 1.0)
    positive = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    expected = torch.cat([positive, negative, torch.zeros(1)]).sort().values
    torch.testing.assert_close(grid("nf4").values, expected / expected.max(), rtol=0, atol=3e-5)


# --- signal to quantization noise: rows of 4096 values, abs-max scales, the mean of rows in dB ---

ROWS = {
    "gaussian": torch.distributions.Normal(0.0, 1.0),
    "laplace": torch.distributions.Laplace(0.0, 1.0),
    "t5": torch.distributions.StudentT(5.0),
}
# dB, in this order of formats; "/128" is a group of 128 instead of the row.
FORMATS = ["e3m2", "e2m3", "int6-narrow", "int4-narrow", "int4-narrow/128", "e2m1/128", "int8-narrow"]
NOISE = {
    "gaussian": [25.59, 30.90, 28.96, 16.04, 18.55, 19.23, 41.22],
    "laplace": [25.62, 29.07, 24.86, 12.12, 15.94, 18.36, 37.09],
    "t5": [25.60, 27.30, 22.14, 9.32, 15.36, 18.19, 34.38],
}


def rows_of(distribution: str, rows: int = 256) -> torch.Tensor:
    torch.manual_seed(0)
    return ROWS[distribution].sample((rows, 4096))


def decibels(weight: torch.Tensor, name: str) -> float:
    table = grid(name.split("/")[0])
    groups = weight.unflatten(1, (-1, 128)) if "/" in name else weight.unsqueeze(1)
    scale = groups.abs().amax(-1, keepdim=True) / table.highest
    noise = (table.round(groups / scale) * scale - groups).double().flatten(1)
    return float(10 * torch.log10(weight.double().square().sum(1) / noise.square().sum(1)).mean())


@pytest.mark.parametrize("distribution", ROWS)
def test_noise_is_what_it_should_be(distribution):
    weight = rows_of(distribution)
    found = dict(zip(FORMATS, (decibels(weight, name) for name in FORMATS), strict=True))
    expected = dict(zip(FORMATS, NOISE[distribution], strict=True))
    for name in FORMATS:
        # A row's largest number decides under a uniform grid, and of t(5) it varies: rows spread by 2.2 dB.
        spread = 0.3 if distribution == "t5" and name in ("int4-narrow", "int6-narrow", "int8-narrow") else 0
        assert found[name] == pytest.approx(expected[name], abs=0.2 + spread), name
    for more, less in (("int8-narrow", "int6-narrow"), ("int6-narrow", "int4-narrow")):
        assert found[more] - found[less] == pytest.approx(expected[more] - expected[less], abs=0.1)


def test_every_format_is_a_grid_or_fitted():
    for name in ("int4", "int4-narrow", "e2m1", "nf4", "fp4", "power4:0.5"):
        known = format_called(name)
        assert known.grid is not None
        assert (known.name, known.bits) == (known.grid.name, known.grid.bits)
        assert known.fit is None
    for name in ("power4", "power4:network", "codebook4"):
        known = format_called(name)
        assert (known.grid, known.name, known.bits) == (None, name, 4)
        assert known.network_wide == name.endswith("network")
