from __future__ import annotations

import math
import re
from functools import cache

import pytest
import torch

from quantlab.checkpoint.native import layer_tensors, read_layer
from quantlab.errors import RecipeError
from quantlab.nn import QuantLinear
from quantlab.numerics import Grid, QTensor, Sample, apply_scales, choose_scales, format_called, grid
from quantlab.storage import Storage, packed_tensors, unpacked

FORMATS = [
    *(f"int{bits}" for bits in range(2, 9)),
    *("int4-narrow", "int8-narrow", "e2m1", "e3m1", "e2m2", "e3m2", "e2m3", "e4m3", "e5m2", "nf3", "nf4", "fp4"),
    *("power4", "power3:0.5", "codebook1", "codebook4", "codebook8"),
]
SCALE_TYPES = ["float32", "float16", "bfloat16", "e8m0", "e4m3", "int8", "dynamic8"]
WEIGHT = torch.randn(24, 192, generator=torch.Generator().manual_seed(0)) * 0.02


@cache
def table_of(name: str, granularity: int | str) -> Grid:
    return format_called(name).grid_for(Sample(WEIGHT, granularity))


def quantized(name: str, granularity: int | str, stored: str, symmetric: bool) -> QTensor:
    table = table_of(name, granularity)
    how = {"symmetric": symmetric, "search": False, "stored": stored}
    scales = choose_scales(WEIGHT, table, granularity, **how)
    return QTensor.of(apply_scales(WEIGHT, table, scales), scales, table)


def same(one: QTensor, other: QTensor) -> bool:
    pairs = [(one.codes, other.codes), (one.scales, other.scales), (one.grid.values, other.grid.values)]
    for mine, yours in ((one.zeros, other.zeros), (one.outer, other.outer)):
        assert (mine is None) == (yours is None)
        if isinstance(mine, torch.Tensor):
            pairs.append((mine, yours))
    if one.outer is not None:
        assert (one.outer.offset is None) == (other.outer.offset is None)
        pairs.append((one.outer.scales, other.outer.scales))
        if one.outer.offset is not None:
            pairs.append((one.outer.offset, other.outer.offset))
    return all(a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


@pytest.mark.parametrize("stored", SCALE_TYPES)
@pytest.mark.parametrize("granularity", ["tensor", "channel", 32, 64])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_packed_comes_back(name, symmetric, granularity, stored):
    """As tensors, as a module and as a checkpoint's layer: the same codes, scales, zeros and table."""
    q = quantized(name, granularity, stored, symmetric)
    layer = QuantLinear.from_qtensor(q)
    assert same(layer.to_qtensor(), q)
    storage = Storage.of(q)
    assert Storage.from_dict(storage.to_dict()) == storage == layer.storage
    tensors = packed_tensors(q)
    specs = storage.specs()
    assert {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()} == specs
    assert same(unpacked(tensors, storage), q)
    assert same(read_layer(layer_tensors("a.b", q), "a.b", storage), q)
    stored_bits = sum(8 * math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())
    assert stored_bits == q.stored_bits()
    assert q.dequantize().isfinite().all()
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x @ q.dequantize().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("e1m0", "format e1m0: use 3 to 8 bits"),
        ("e6m6", "format e6m6: use 3 to 8 bits"),
        ("power4:0.05", "exponent from 0.1 to 1"),
        ("power4:1.5", "exponent from 0.1 to 1"),
        ("power9", "format 'power9' is unknown"),
        ("codebook9", "format 'codebook9' is unknown"),
        ("int4-wide", "format 'int4-wide' is unknown"),
        ("power4:layer", "format 'power4:layer' is unknown"),
    ],
)
def test_formats_that_there_are_not(name, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        format_called(name)


@pytest.mark.parametrize("name", ["power4", "power4:network", "codebook4"])
def test_a_fitted_format_has_no_table_of_its_own(name):
    with pytest.raises(RecipeError, match=f"format '{name}' has a table of its own for each weight"):
        grid(name)


def test_a_tables_name_is_a_format():
    """What a checkpoint calls a table is what a recipe could call it."""
    for name in FORMATS:
        table = table_of(name, "channel")
        if not name.startswith("codebook"):
            again = grid(table.name)
            assert again.name == table.name
            torch.testing.assert_close(again.values, table.values, rtol=1e-5, atol=0)
