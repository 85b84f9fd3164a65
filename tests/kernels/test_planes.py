from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantlab_kernels.packing import pack, packed_width, unpack
from quantlab_kernels.planes import decode_half, from_patterns, pack_planes, to_patterns, unpack_planes

from quantlab.numerics import grid

TYPES = {"e2m1": "float4_e2m1fn", "e3m2": "float6_e3m2fn", "e2m3": "float6_e2m3fn", "e4m3": "float8_e4m3fn"}
# Every minifloat of 3 to 8 bits that float16 holds: e5m1 reads its highest exponent as infinity there.
FORMATS = [
    (exponent, mantissa)
    for exponent in range(1, 6)
    for mantissa in range(0, 8 - exponent)
    if exponent + mantissa >= 2 and (exponent < 5 or mantissa == 2)
]


def random_patterns(*shape: int) -> torch.Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.uint8)


@pytest.mark.parametrize(("exponent", "mantissa"), FORMATS)
def test_codes_become_patterns_and_come_back(exponent, mantissa):
    table = grid(f"e{exponent}m{mantissa}")
    codes = torch.arange(len(table), dtype=torch.uint8)
    patterns = to_patterns(codes, exponent, mantissa, len(table))
    assert torch.equal(from_patterns(patterns, exponent, mantissa, len(table)), codes)
    assert len(patterns.unique()) == len(table)
    assert torch.equal(torch.sign(table.values) < 0, patterns >= 1 << (exponent + mantissa))


@pytest.mark.parametrize("name", TYPES)
def test_patterns_are_those_of_ml_dtypes(name):
    table, exponent, mantissa = grid(name), int(name[1]), int(name[3])
    patterns = to_patterns(torch.arange(len(table), dtype=torch.uint8), exponent, mantissa, len(table))
    values = patterns.numpy().view(getattr(ml_dtypes, TYPES[name])).astype(np.float32)
    assert values.tolist() == table.values.tolist()


def test_negative_zero_is_zero():
    zero = from_patterns(torch.tensor([0, 32], dtype=torch.uint8), 3, 2)
    assert zero.tolist() == [31, 31]
    assert float(grid("e3m2").values[31]) == 0


@pytest.mark.parametrize(("exponent", "mantissa"), [(3, 2), (2, 3)])
def test_the_shifted_bias_is_the_table_for_all_64(exponent, mantissa):
    patterns = torch.arange(64, dtype=torch.uint8)
    expected = grid(f"e{exponent}m{mantissa}").values[from_patterns(patterns, exponent, mantissa).long()]
    decoded = decode_half(patterns, exponent, mantissa)
    assert decoded.dtype == torch.float16
    assert torch.equal(decoded.float(), expected)
    assert bool(decoded[32].signbit()), "the negative zero keeps its sign"


@pytest.mark.parametrize(("exponent", "mantissa"), FORMATS)
def test_the_shifted_bias_is_the_table(exponent, mantissa):
    table = grid(f"e{exponent}m{mantissa}")
    codes = torch.arange(len(table), dtype=torch.uint8)
    decoded = decode_half(to_patterns(codes, exponent, mantissa, len(table)), exponent, mantissa)
    assert torch.equal(decoded.float(), table.values)


@pytest.mark.parametrize(("exponent", "mantissa"), [(6, 1), (0, 3), (5, 3)])
def test_what_float16_does_not_hold_is_refused(exponent, mantissa):
    with pytest.raises(ValueError, match="float16 holds up to 5"):
        decode_half(torch.zeros(1, dtype=torch.uint8), exponent, mantissa)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 70), st.integers(1, 4))
def test_planes_of_any_length(columns, rows):
    patterns = random_patterns(rows, columns)
    high, low = pack_planes(patterns)
    assert high.shape == (rows, -(-columns // 4))
    assert low.shape == (rows, -(-columns // 2))
    assert torch.equal(unpack_planes(high, low, columns), patterns)
    for row, column in np.ndindex(rows, columns):
        top = int(high[row, column // 4]) >> 2 * (column % 4) & 3
        rest = int(low[row, column // 2]) >> 4 * (column % 2) & 15
        assert top << 4 | rest == int(patterns[row, column])


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 70), st.integers(1, 4))
def test_six_dense_bits_of_any_length(columns, rows):
    patterns = random_patterns(rows, columns)
    packed = pack(patterns, 6)
    assert packed.shape == (rows, packed_width(columns, 6)) == (rows, -(-columns * 6 // 8))
    assert torch.equal(unpack(packed, 6, columns), patterns)
    for row in range(rows):
        stream = int.from_bytes(bytes(packed[row].tolist()), "little")
        assert [stream >> 6 * k & 63 for k in range(columns)] == patterns[row].tolist()


def test_planes_take_no_more_room_than_the_stream():
    patterns = random_patterns(3, 64)
    assert sum(plane.numel() for plane in pack_planes(patterns)) == pack(patterns, 6).numel()


def test_seven_bits_are_refused():
    with pytest.raises(ValueError, match="pattern 64 does not fit in 6 bits"):
        pack_planes(torch.tensor([[64]], dtype=torch.uint8))
