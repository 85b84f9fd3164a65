from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantlab_kernels import decode, pack
from quantlab_kernels.reference import quantized_linear


def layer(rows=6, columns=24, groups=3, bits=4, *, zeros=None, scale_rows=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    table = torch.linspace(-1, 1, 2**bits) ** 3 * 8
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8)
    shape = (scale_rows or rows, groups)
    scales = (torch.rand(shape, generator=generator) + 0.1).to(dtype)
    offsets = None
    if zeros is not None:
        offsets = torch.randint(-4, 5, shape, generator=generator).to(zeros)
    return codes, scales, offsets, table


def naive_decode(codes, scales, zeros, table):
    """Entry by entry: (table[code] - zero) * scale."""
    rows, columns = codes.shape
    size = columns // scales.shape[1]
    weight = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            at = (min(i, scales.shape[0] - 1), j // size)
            zero = 0.0 if zeros is None else float(zeros[at])
            value = torch.tensor(float(table[codes[i, j].item()]) - zero, dtype=torch.float32)
            weight[i, j] = value * scales[at].float()
    return weight


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    size=st.integers(1, 5),
    zeros=st.sampled_from([None, torch.int8, torch.bfloat16]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    shared=st.booleans(),
)
def test_decodes_entry_by_entry(bits, rows, groups, size, zeros, dtype, shared):
    groups, scale_rows = (1, 1) if shared else (groups, rows)
    parts = layer(rows, groups * size, groups, bits, zeros=zeros, scale_rows=scale_rows, dtype=dtype)
    assert torch.equal(decode(*parts), naive_decode(*parts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decode_rounds_once(dtype):
    parts = layer(zeros=torch.int8)
    assert torch.equal(decode(*parts, dtype=dtype), naive_decode(*parts).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_linear_is_the_product_with_the_decoded_weight(bits, dtype):
    codes, scales, zeros, table = layer(bits=bits, zeros=torch.int8)
    x = torch.randn(2, 5, 24).to(dtype)
    y = quantized_linear(x, pack(codes, bits), scales, zeros, table, bits)
    assert y.dtype == dtype
    assert torch.equal(y, x @ decode(codes, scales, zeros, table, dtype).T)


def test_linear_adds_bias_and_low_rank():
    codes, scales, zeros, table = layer(zeros=torch.bfloat16)
    x, bias = torch.randn(3, 24), torch.randn(6)
    low_rank = torch.randn(6, 2), torch.randn(2, 24)
    y = quantized_linear(x, pack(codes, 4), scales, zeros, table, 4, bias, low_rank)
    weight = naive_decode(codes, scales, zeros, table) + low_rank[0] @ low_rank[1]
    torch.testing.assert_close(y, x @ weight.T + bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bias_and_low_rank_follow_the_activations(dtype):
    codes, scales, zeros, table = layer()
    low_rank = torch.randn(6, 2), torch.randn(2, 24)
    x = torch.randn(3, 24).to(dtype)
    y = quantized_linear(x, pack(codes, 4), scales, zeros, table, 4, torch.randn(6), low_rank)
    assert y.dtype == dtype


def test_no_rows():
    codes, scales, zeros, table = layer()
    assert quantized_linear(torch.empty(0, 24), pack(codes, 4), scales, zeros, table, 4).shape == (0, 6)
