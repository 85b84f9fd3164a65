from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.errors import RecipeError
from quantlab.numerics import Grid, format_called, grid

# A table like NF4: no two steps alike, more entries above zero than below.
NORMAL_FLOAT = Grid(
    "nf4-like",
    4,
    torch.tensor([-1.0, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0]),
)
# Integers that are not two's complement, halves, a sparse table, one not as long as its bits allow.
ODD = [
    Grid("unsigned", 4, torch.arange(16.0)),
    Grid("ternary", 2, torch.tensor([-1.0, 0.0, 1.0])),
    Grid("halves", 3, torch.arange(-4.0, 4.0) / 2),
    Grid("shifted", 3, torch.arange(-4.0, 4.0) + 0.5),
    Grid("power", 3, torch.tensor([-8.0, -4.0, -2.0, -1.0, 1.0, 2.0, 4.0, 8.0])),
    NORMAL_FLOAT,
]


def formats() -> list[str]:
    """Every format that quantlab has: what it tells someone who asks for one that it has not."""
    with pytest.raises(RecipeError) as caught:
        grid("no-such-format")
    named = re.findall(r"[\w.:-]+", str(caught.value).split("such as", 1)[1].split(", with")[0])
    widths = [*(f"int{bits}" for bits in range(2, 9)), "nf3", "e2m1", "e2m3", "e2m2", "power3:0.6", "int8-narrow"]
    return [*widths, *(name for name in named if format_called(name).grid is not None)]


GRIDS = [*map(grid, formats()), *ODD]
each_grid = pytest.mark.parametrize("table", GRIDS, ids=lambda table: table.name)


def distances(x: torch.Tensor, table: Grid) -> torch.Tensor:
    """``[len(x), len(table)]`` in float64: how far each entry is from each number."""
    return (x.double()[:, None] - table.values.double()[None, :]).abs()


def test_the_integer_formats_are_twos_complement():
    assert {f"int{bits}" for bits in range(2, 9)} <= set(formats())
    for bits in range(2, 9):
        table = grid(f"int{bits}")
        assert table.bits == bits
        assert table.values.tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
        assert table.is_integer
        assert len(table) == 2**bits


@pytest.mark.parametrize("name", ["int1", "int9", "int10", "int", "int4 ", "INT4", "fp99", "", "none"])
def test_unknown_names_are_refused_with_what_there_is(name):
    with pytest.raises(RecipeError, match=re.escape(repr(name)) + ".*int4"):
        grid(name)


@each_grid
def test_nearest_is_the_nearest_of_all_entries(table):
    span = table.highest - table.lowest
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4000, generator=generator) * 1.4 * span + table.lowest - 0.2 * span
    codes = table.nearest(x)
    assert codes.dtype == torch.uint8
    chosen = distances(x, table).gather(1, codes.long()[:, None]).squeeze(1)
    assert torch.all(chosen <= distances(x, table).amin(1) + 1e-6 * span)
    assert set(codes.tolist()) == set(range(len(table))), "every code is somewhere the nearest"


@each_grid
def test_round_is_the_entry_that_nearest_names(table):
    x = torch.linspace(table.lowest - 1, table.highest + 1, 1001)
    assert torch.equal(table.round(x), table.values[table.nearest(x).long()])
    assert torch.equal(table.round(table.values), table.values)
    assert torch.equal(table.nearest(table.values), torch.arange(len(table), dtype=torch.uint8))


@each_grid
def test_values_beyond_the_ends_saturate(table):
    x = torch.tensor([-torch.inf, -3e38, table.lowest - 0.6, table.highest + 0.6, 3e38, torch.inf])
    last = len(table) - 1
    assert table.nearest(x).tolist() == [0, 0, 0, last, last, last]
    assert table.round(x).tolist() == [table.lowest] * 3 + [table.highest] * 3


def test_integer_ties_go_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert grid("int4").round(x).tolist() == [-2, -2, 0, 0, 2, 2]
    assert (grid("int4").nearest(x).int() - 8).tolist() == [-2, -2, 0, 0, 2, 2]


def test_ties_of_a_table_go_to_the_smaller_entry():
    power = next(table for table in ODD if table.name == "power")
    assert power.round(torch.tensor([-6.0, -3.0, 0.0, 1.5, 6.0])).tolist() == [-8, -4, -1, 1, 4]


@each_grid
def test_shape_is_kept_and_the_argument_is_not_written_to(table):
    x = torch.linspace(-2, 2, 24).view(2, 3, 4)
    before = x.clone()
    assert table.nearest(x).shape == table.round(x).shape == x.shape
    assert torch.equal(x, before)


@each_grid
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_round_keeps_the_dtype(table, dtype):
    x = torch.linspace(table.lowest, table.highest, 40).to(dtype)
    assert table.round(x).dtype == dtype
    chosen = (x.double() - table.round(x).double()).abs()
    assert torch.all(chosen <= distances(x, table).amin(1) + 0.01 * (table.highest - table.lowest))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=16, unique=True),
    st.lists(st.floats(-2e3, 2e3, width=32), min_size=1, max_size=20),
)
def test_nearest_on_any_table(values, xs):
    table = Grid("any", 4, torch.tensor(sorted(values), dtype=torch.float32))
    x = torch.tensor(xs, dtype=torch.float32)
    far = distances(x, table)
    chosen = far.gather(1, table.nearest(x).long()[:, None]).squeeze(1)
    assert torch.all(chosen <= far.amin(1) * (1 + 1e-6) + 1e-30)


def test_ends_extreme_and_integer():
    assert (grid("int4").lowest, grid("int4").highest, grid("int4").extreme) == (-8, 7, -8)
    by_name = {table.name: table for table in ODD}
    assert by_name["unsigned"].extreme == 15
    assert by_name["unsigned"].is_integer
    assert by_name["ternary"].is_integer
    assert not any(by_name[name].is_integer for name in ("halves", "shifted", "power", "nf4-like"))


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([0.0, 1.0, 1.0]),
        torch.tensor([1.0, 0.0]),
        torch.tensor([0.0, torch.nan]),
        torch.tensor([0.0]),
        torch.arange(5.0),
        torch.arange(4.0).view(2, 2),
        torch.arange(4),
        torch.arange(4.0, dtype=torch.float64),
    ],
    ids=["equal", "falling", "nan", "one", "more-than-bits", "2d", "int64", "float64"],
)
def test_a_table_that_is_none_is_refused(values):
    with pytest.raises(ValueError, match="broken: "):
        Grid("broken", 2, values)


def test_a_grid_is_made_once():
    assert grid("int4") is grid("int4")


@each_grid
def test_cells_find_what_a_search_finds(table):
    """Everything on a border between two codes, beside it, and beyond the ends."""
    borders = (table.values[1:].double() + table.values[:-1].double()).div(2).float()
    ends = [torch.full_like(borders, end) for end in (-torch.inf, torch.inf)]
    beside = [torch.nextafter(borders, end) for end in ends]
    spread = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * table.highest
    x = torch.cat([borders, *beside, spread, torch.tensor([torch.inf, -torch.inf, 3e38, -3e38])])
    up = torch.zeros_like(borders, dtype=torch.bool) if table.ties is None else table.ties
    if table.is_integer:
        up = borders.round() > borders
    cuts = torch.where(up, torch.nextafter(borders, ends[0]), borders)
    assert table.nearest(x).tolist() == torch.bucketize(x, cuts).tolist()


def test_most_tables_are_looked_up_in_cells():
    for name in ("nf4", "fp4", "e2m1", "e3m2", "e2m3", "power4:0.5"):
        assert grid(name)._cells is not None
    assert grid("e4m3")._cells is None  # steps of 1/512 on a range of 900
