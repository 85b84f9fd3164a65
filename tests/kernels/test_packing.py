from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantlab_kernels import pack, packed_width, unpack


def naive_pack(row: list[int], bits: int) -> list[int]:
    """The definition, bit by bit: code k occupies the bits k*b .. k*b + b - 1 of a little-endian stream."""
    stream = [code >> i & 1 for code in row for i in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return [sum(bit << i for i, bit in enumerate(stream[at : at + 8])) for at in range(0, len(stream), 8)]


@st.composite
def rows_of_codes(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    bits = draw(st.integers(1, 8))
    columns = draw(st.integers(0, 40))
    code = st.integers(0, 2**bits - 1)
    return draw(st.lists(st.lists(code, min_size=columns, max_size=columns), min_size=1, max_size=3)), bits


@settings(deadline=None, max_examples=150)
@given(rows_of_codes())
def test_packs_as_defined_and_back(drawn):
    rows, bits = drawn
    codes = torch.tensor(rows, dtype=torch.uint8).view(len(rows), -1)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [naive_pack(row, bits) for row in rows]
    assert packed.shape[-1] == packed_width(codes.shape[1], bits)
    assert torch.equal(unpack(packed, bits, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_at_every_place_of_a_unit(bits):
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat_interleave(9).view(-1, 9)
    codes = codes.roll(1, 0) + 0 * codes  # neighbouring rows differ
    assert pack(codes, bits).tolist() == [naive_pack(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack(pack(codes, bits), bits, 9), codes)


def test_leading_dimensions_are_kept():
    codes = torch.randint(0, 8, (2, 3, 5), dtype=torch.uint8)
    packed = pack(codes, 3)
    assert packed.shape == (2, 3, 2)
    assert torch.equal(unpack(packed, 3, 5), codes)


def test_accepts_wider_integers_and_strided_rows():
    codes = torch.randint(0, 16, (6, 7)).T
    assert torch.equal(unpack(pack(codes, 4), 4, 6), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", [0, 9])
def test_refuses_other_widths(bits):
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack(torch.zeros(1, 8, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        unpack(torch.zeros(1, 8, dtype=torch.uint8), bits, 8)


@pytest.mark.parametrize("code", [-1, 8, 300])
def test_refuses_codes_that_do_not_fit(code):
    with pytest.raises(ValueError, match="do not fit in 3 bits"):
        pack(torch.tensor([[0, code]]), 3)


def test_refuses_rows_of_another_length():
    with pytest.raises(ValueError, match="take 3 bytes a row, not 4"):
        unpack(torch.zeros(1, 4, dtype=torch.uint8), 4, 6)
