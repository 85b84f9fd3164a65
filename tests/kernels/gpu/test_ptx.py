"""The text of the inline-asm decodes, run by a model of PTX for every code, against the tables."""

from __future__ import annotations

import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ptx_model import half_value, lop3, prmt, round_half, run
from quantlab_kernels.gpu import decode, ptx
from quantlab_kernels.gpu.formats import E2M3, E3M2, INTEGER, TABLE16, Format, Reading
from quantlab_kernels.gpu.layout import window_width
from quantlab_kernels.planes import to_patterns

from quantlab.numerics import grid

HALF, BRAIN = (10, 5), (7, 8)


def window(codes: list[int], bits: int, garbage: int) -> int:
    """A window as kernels hold it, pair by pair, with ``garbage`` in the bits that no code takes."""
    width = window_width(bits)
    word, taken = 0, 0
    for i, code in enumerate(codes):
        at = i // 2 * width + 16 * (i % 2)
        word |= code << at
        taken |= ((1 << bits) - 1) << at
    return word | (garbage & ~taken & 0xFFFFFFFF)


def windows(bits: int, count: int):
    """Windows in which every code comes at every place, and what else there is in a word is random."""
    generator = torch.Generator().manual_seed(bits)
    numbers = 32 // window_width(bits)
    for code in range(count):
        for place in range(numbers):
            codes = torch.randint(0, count, (numbers,), generator=generator).tolist()
            codes[place] = code
            garbage = int(torch.randint(0, 1 << 32, (1,), generator=generator))
            yield codes, window(codes, bits, garbage)


def text_of_half(format: Format, zeros: bool, scales: bool, brain: bool) -> str:
    width = window_width(format.bits)
    return ptx.half_text(format.decode, format.bits, width, format.offset, zeros, scales, brain)


@pytest.mark.parametrize("brain", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_exact(bits, brain):
    if not ptx.has_half_text(INTEGER, bits, brain):
        assert (bits, brain) == (8, True), "only 8 bits do not fit into bfloat16"
        return
    for offset in (-(1 << (bits - 1)), 0, 1 - (1 << (bits - 1))):
        text = text_of_half(Format(bits, INTEGER, offset), False, False, brain)
        for codes, word in windows(bits, 1 << bits):
            found = run(text, 32 // window_width(bits), [word])
            assert [half_value(bits16, *(BRAIN if brain else HALF)) for bits16 in found] == [c + offset for c in codes]


@pytest.mark.parametrize("brain", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_zeros_and_scales_are_applied_with_one_rounding(bits, brain):
    kind = BRAIN if brain else HALF
    text = text_of_half(Format(bits, INTEGER, -2), True, True, brain)
    scale_bits, zero_bits = round_half(Fraction(1), 0, *kind) + 37, round_half(Fraction(-3), 0, *kind)
    scale, zero = half_value(scale_bits, *kind), half_value(zero_bits, *kind)
    for codes, word in windows(bits, 1 << bits):
        found = run(text, 32 // window_width(bits), [word, scale_bits, zero_bits])
        expected = [round_half((c - 2 - zero) * scale, 0, *kind) for c in codes]
        assert [f & 0x7FFF if f == 0x8000 else f for f in found] == expected


@pytest.mark.parametrize(("decode_as", "name", "factor"), [(E3M2, "e3m2", 2**12), (E2M3, "e2m3", 2**14)])
def test_six_bit_floats_are_exact(decode_as, name, factor):
    table = grid(name).values
    exponent, mantissa = int(name[1]), int(name[3])
    patterns = to_patterns(torch.arange(63, dtype=torch.uint8), exponent, mantissa).tolist()
    text = text_of_half(Format(6, decode_as), False, False, False)
    for codes, word in windows(6, 63):
        with_patterns = window([patterns[c] for c in codes], 6, word & ~window([63] * 4, 6, 0))
        found = run(text, 4, [with_patterns])
        assert [float(half_value(bits, *HALF)) * factor for bits in found] == [float(table[c]) for c in codes]


def test_the_two_halves_of_a_word():
    for low, high in [(0x0001, 0x8001), (0x3C00, 0x7BFF), (0x0000, 0x8000)]:
        found = run(decode.HALVES.value, 2, [low | high << 16])
        expected = [struct.unpack("<e", struct.pack("<H", half))[0] for half in (low, high)]
        assert [struct.unpack("<f", struct.pack("<I", bits))[0] for bits in found] == expected


def test_no_lane_is_zero_for_every_lane():
    from quantlab_kernels.gpu.plans import MAGIC

    assert {run(decode.NO_LANE.value, 1, [MAGIC], lane)[0] for lane in range(32)} == {0}


TABLES = {
    "nf4": grid("nf4").values,
    "power": torch.linspace(-1, 1, 15).sign() * torch.linspace(-1, 1, 15).abs() ** 2.5,
    "one-sided": torch.linspace(0.1, 40000.0, 16),
    "tiny": torch.linspace(-1, 1, 16) * 1e-20,
    "eight": torch.tensor([-3.0, -1.0, -0.25, 0.0, 0.1, 0.7, 2.0, 9.0]),
    "four": torch.tensor([-1.0, 0.0, 0.3, 1.0]),
}


def looked_up(reading: Reading, result: str, codes: list[int], bits: int, garbage: int) -> list[int]:
    """The look-up as ``decode.values`` calls it: nibbles, or two calls for codes two bits apart."""
    assert reading.table is not None
    table = [word & 0xFFFFFFFF for word in reading.table.tolist()]
    text = ptx.prmt_text(result, 16 if bits == 4 else 8)
    word = window(codes, bits, garbage)
    if bits > 2:
        return run(text, 8, [word, *table])
    even = run(text, 8, [word & 0x33333333, *table])
    odd = run(text, 8, [(word >> 2) & 0x33333333, *table])
    return [found for j in range(4) for found in (even[2 * j], even[2 * j + 1], odd[2 * j], odd[2 * j + 1])]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", TABLES)
def test_tables_in_registers_are_what_their_twins_read(name, dtype, dense):
    table = TABLES[name]
    bits = {4: 2, 8: 3}.get(len(table), 4)
    reading = Reading.of(Format(bits, TABLE16), table, dtype, dense)
    assert reading.twin is not None
    result = "half" if dense else "subnormal" if dtype == torch.float16 else "upper"
    expected = reading.twin.to(dtype).view(torch.int16) if dense else reading.twin.view(torch.int32)
    mask = 0xFFFF if dense else 0xFFFFFFFF
    for codes, word in windows(bits, len(table)):
        found = looked_up(reading, result, codes, bits, word)
        assert found == [int(expected[c]) & mask for c in codes]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", TABLES)
def test_tables_in_registers_are_near_the_tables(name, dtype, dense):
    table = TABLES[name].double()
    reading = Reading.of(Format(4, TABLE16), table.float(), dtype, dense)
    assert reading.twin is not None
    input_factor = 2.0**110 if dtype == torch.float16 and not dense else 1.0
    read = reading.twin[: len(table)].double() * input_factor * reading.factor - reading.fold
    off = (read - table).abs()
    if dtype == torch.float16 and not dense:
        assert float(off.max()) <= 2**-15 * float(table.max().clamp(min=0) - table.min().clamp(max=0))
        assert bool((read[table == 0] == 0).all())
    else:
        significant = 11 if dtype == torch.float16 else 8
        assert bool((off <= 2.0**-significant * table.abs() * 1.02 + 2.0**-25 * table.abs().max()).all())


# --- the model itself ---


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_logic_and_bytes_of_the_model(a, b, c):
    assert lop3(a, b, c, 0xEA) == (a & b) | c
    assert lop3(a, b, c, 0xCA) == (a & b) | (~a & c) & 0xFFFFFFFF
    assert prmt(a, b, 0x3210) == a
    assert prmt(a, b, 0x7654) == b
    assert prmt(a, b, 0x5410) == (a & 0xFFFF) | (b & 0xFFFF) << 16
    assert prmt(a, b, 0x888B) >> 8 == (0xFFFFFF if a & 0x80 else 0)


@given(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1))
@settings(deadline=None)
def test_rounding_of_the_model_is_torch_rounding(a, b):
    for dtype, kind in ((torch.float16, HALF), (torch.bfloat16, BRAIN)):
        x, y = (torch.tensor([v], dtype=torch.int32).to(torch.int16).view(dtype) for v in (a, b))
        # Products of two such numbers are exact in float64, and torch rounds float64 through float32.
        product = x.double() * y.double()
        if not (x.isfinite().all() and y.isfinite().all()) or not 1e-4 < float(product.abs()) < 1e4:
            continue
        exact = half_value(a, *kind) * half_value(b, *kind)
        assert round_half(exact, 0, *kind) == int(product.float().to(dtype).view(torch.int16)) & 0xFFFF
