from __future__ import annotations

import pytest
import torch

from quantlab.numerics import Grid, LowRank, QTensor, grid

TABLE = Grid("table", 3, torch.tensor([-3.0, -1.5, -0.25, 0.0, 0.5, 2.0, 7.0]))


def random_qtensor(rows, columns, groups, *, table=TABLE, zeros=True, dtype=torch.float32, scale_rows=None):
    generator = torch.Generator().manual_seed(rows * columns + groups)
    codes = torch.randint(0, len(table), (rows, columns), generator=generator, dtype=torch.uint8)
    shape = (scale_rows or rows, groups)
    scales = torch.randn(shape, generator=generator).to(dtype)
    zero = torch.randint(-4, 4, shape, generator=generator, dtype=torch.int8) if zeros else None
    return QTensor(codes, scales, zero, table)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize(("groups", "scale_rows"), [(1, None), (3, None), (12, None), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_is_the_definition_entry_by_entry(groups, scale_rows, zeros, dtype):
    q = random_qtensor(5, 12, groups, zeros=zeros, dtype=dtype, scale_rows=scale_rows)
    expected = torch.empty(5, 12)
    for i in range(5):
        for j in range(12):
            at = (0 if scale_rows == 1 else i, j // (12 // groups))
            zero = 0.0 if q.zeros is None else float(q.zeros[at])
            expected[i, j] = (float(q.grid.values[int(q.codes[i, j])]) - zero) * float(q.scales[at])
    assert q.shape == (5, 12)
    assert torch.equal(q.dequantize(), expected)
    assert torch.equal(q.dequantize(torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_low_rank_term_is_added_before_the_result_is_rounded(dtype):
    plain = random_qtensor(6, 8, 2)
    left, right = torch.randn(6, 2).half(), torch.randn(2, 8).half()
    q = QTensor(plain.codes, plain.scales, plain.zeros, plain.grid, LowRank(left, right))
    expected = plain.dequantize().double() + left.double() @ right.double()
    torch.testing.assert_close(q.dequantize(), expected.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(q.dequantize(dtype), q.dequantize().to(dtype))


def test_bits_count_codes_scales_and_table():
    q = QTensor(torch.zeros(16, 128, dtype=torch.uint8), torch.ones(16, 2).bfloat16(), None, grid("int4"))
    codes, scales, table = 16 * 128 * 4, 16 * 2 * 16, 16 * 32
    assert q.stored_bits() == codes + scales + table
    assert q.bits_per_weight() == (codes + scales + table) / (16 * 128)


def test_bits_count_zeros_padding_and_low_rank():
    low_rank = LowRank(torch.zeros(2, 3).half(), torch.zeros(3, 9))
    codes = torch.zeros(2, 9, dtype=torch.uint8)
    q = QTensor(codes, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int8), TABLE, low_rank)
    row = 32  # 9 codes of 3 bits are 27 bits: a row takes 4 bytes
    expected = 2 * row + 2 * 32 + 2 * 8 + 7 * 32 + 2 * 3 * 16 + 3 * 9 * 32
    assert q.stored_bits() == expected
    assert q.bits_per_weight() == expected / 18


@pytest.mark.parametrize("zeros", [True, False])
def test_split_undoes_a_concatenation(zeros):
    q = random_qtensor(7, 12, 3, zeros=zeros)
    parts = q.split([2, 1, 4])
    assert [part.shape for part in parts] == [(2, 12), (1, 12), (4, 12)]
    assert all(part.grid is q.grid and (part.zeros is None) is (not zeros) for part in parts)
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), q.dequantize())


@pytest.mark.parametrize("rows", [[3, 3], [8], [7, 1], []])
def test_split_refuses_parts_that_do_not_add_up(rows):
    with pytest.raises(ValueError, match="add up to 7"):
        random_qtensor(7, 12, 3).split(rows)


def test_split_refuses_what_the_rows_share():
    with pytest.raises(ValueError, match="scales of their own"):
        random_qtensor(4, 8, 1, scale_rows=1).split([2, 2])
    q = random_qtensor(4, 8, 1)
    low_rank = LowRank(torch.zeros(4, 1), torch.zeros(1, 8))
    with pytest.raises(ValueError, match="scales of their own"):
        QTensor(q.codes, q.scales, q.zeros, q.grid, low_rank).split([2, 2])
