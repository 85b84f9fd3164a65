from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantlab_kernels.gpu.layout import (
    PLANES,
    Layout,
    from_gpu_layout,
    lane_width,
    lane_words,
    to_gpu_layout,
    window_width,
    windows,
)
from quantlab_kernels.packing import pack


def random_codes(bits: int, rows: int, columns: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(columns)).to(
        torch.uint8
    )


@st.composite
def shapes(draw) -> tuple[int, int, int]:
    bits = draw(st.integers(2, 8))
    if draw(st.booleans()):
        return bits, draw(st.integers(1, 300)), 1
    group = lane_width(bits) * draw(st.integers(1, 9))
    groups = draw(st.integers(2, 5))
    return bits, group * groups, groups


@settings(deadline=None, max_examples=80)
@given(shapes(), st.integers(1, 4))
def test_it_is_the_stored_codes_in_another_order(shape, rows):
    bits, columns, groups = shape
    layout = Layout.of(bits, columns, groups)
    stored = pack(random_codes(bits, rows, columns), bits)
    words = to_gpu_layout(stored, layout)
    assert words.shape == (rows, *layout.shape)
    assert words.dtype == torch.int32
    assert torch.equal(from_gpu_layout(words, layout), stored)


@settings(deadline=None, max_examples=60)
@given(shapes())
def test_every_input_has_one_place_and_a_lane_has_one_scale(shape):
    bits, columns, groups = shape
    layout = Layout.of(bits, columns, groups)
    inputs = layout.inputs()
    assert torch.equal(inputs.flatten().sort().values, torch.arange(inputs.numel()))
    group = inputs[(inputs < columns).flatten(1).all(1)] // (columns // groups)
    assert torch.equal(group.flatten(1).amin(1), group.flatten(1).amax(1))


@pytest.mark.parametrize("bits", PLANES)
def test_a_naive_reading_of_the_words_finds_the_codes(bits):
    """As the docstring says it: windows of planes, pairs in the halves of a word, inputs pair by pair."""
    columns = 256
    layout = Layout.of(bits, columns, 2)
    codes = random_codes(bits, 3, columns)
    words = to_gpu_layout(pack(codes, bits), layout).long() & 0xFFFFFFFF
    lanes, width, mask = layout.unit_lanes, window_width(bits), (1 << bits) - 1
    for row in range(3):
        for lane in range(layout.lanes):
            pair = 0
            for parts in windows(bits):
                window = 0
                for word, shift, kept in parts:
                    value = int(words[row, word, lane])
                    window |= (value >> shift if shift >= 0 else value << -shift) & kept
                for at in range(0, 16, width):
                    first = lane // lanes * layout.unit + pair * 2 * lanes + 2 * (lane % lanes)
                    assert window >> at & mask == codes[row, first]
                    assert window >> (16 + at) & mask == codes[row, first + 1]
                    pair += 1
            assert pair * 2 == lane_width(bits)


@pytest.mark.parametrize("bits", PLANES)
def test_as_many_bytes_as_stored(bits):
    for columns, groups in ((4096, 32), (4096, 1), (1024, 32), (11008, 86)):
        layout = Layout.of(bits, columns, groups)
        assert 4 * layout.shape[0] * layout.shape[1] == columns * bits // 8, (columns, groups)
    assert lane_words(bits) * 32 == lane_width(bits) * bits


@pytest.mark.parametrize("bits", PLANES)
def test_rows_of_odd_lengths_are_padded_by_less_than_a_unit(bits):
    for columns in (1, 33, 100, 576, 1000):
        layout = Layout.of(bits, columns, 1)
        assert 0 <= layout.lanes * lane_width(bits) - columns < 2 * max(layout.unit, 4 * lane_width(bits))


def test_what_has_no_layout_is_refused():
    with pytest.raises(ValueError, match="codes of 1 bits"):
        Layout.of(1, 128, 1)
    with pytest.raises(ValueError, match="do not make 3 equal groups"):
        Layout.of(4, 128, 3)
    with pytest.raises(ValueError, match="groups of 16: 3-bit codes need groups that 32 divides"):
        Layout.of(3, 128, 8)
