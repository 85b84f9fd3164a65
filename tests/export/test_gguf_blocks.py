"""Blocks, read back by the gguf package's own decoder."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.export import gguf_blocks as blocks
from quantlab.export.gguf_search import TYPES, affine_range, quantized_blocks


def read(packed: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(np.array(gguf.quants.dequantize(packed.numpy(), Q[kind.upper()])))


def integers(generator, low, high, *shape):
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int16)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=20)
@pytest.mark.parametrize("kind", TYPES)
def test_every_number_is_where_the_decoder_looks_for_it(kind, seed):
    g = torch.Generator().manual_seed(seed)
    d, m = torch.randn(3, generator=g).half(), torch.randn(3, generator=g).half()
    size = TYPES[kind][1]
    bits = int(kind[1]) if kind != "mxfp4" else 4
    codes = integers(g, 0, 2**bits, 3, size)
    D, M, u = d.float()[:, None], m.float()[:, None], codes.float()
    if kind in ("q4_0", "q5_0"):
        packed, expected = getattr(blocks, kind)(codes, d), D * (u - 2 ** (bits - 1))
    elif kind in ("q4_1", "q5_1"):
        packed, expected = getattr(blocks, kind)(codes, d, m), D * u + M
    elif kind == "q8_0":
        packed, expected = blocks.q8_0(codes - 128, d), D * (u - 128)
    elif kind == "mxfp4":
        exponents = integers(g, 2, 250, 3)
        magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        values = torch.cat([magnitudes, -magnitudes])[codes.int()]
        packed, expected = blocks.mxfp4(codes, exponents), values * 2.0 ** (exponents[:, None].double() - 127)
        expected = expected.float()
    elif kind in ("q3_k", "q6_k"):
        lowest = -32 if kind == "q3_k" else -128
        scales = integers(g, lowest, -lowest, 3, 16)
        packed = getattr(blocks, kind)(codes, scales, d)
        expected = ((D * scales)[:, :, None] * (u - 2 ** (bits - 1)).view(3, 16, 16)).view(3, -1)
    else:
        count, level = (16, 16) if kind == "q2_k" else (8, 64)
        scales, mins = integers(g, 0, level, 3, count), integers(g, 0, level, 3, count)
        packed = getattr(blocks, kind)(codes, scales, mins, d, m)
        expected = (D * scales)[:, :, None] * u.view(3, count, -1) - (M * mins)[:, :, None]
        expected = expected.view(3, -1)
    assert packed.shape == (3, gguf.GGML_QUANT_SIZES[Q[kind.upper()]][1])
    assert torch.equal(read(packed, kind), expected)


@pytest.mark.parametrize("kind", TYPES)
def test_search_is_at_least_as_close_as_the_bits_allow(kind):
    """Normal weights: the error of a uniform code with block scales; the package's own encoders are never better."""
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    relative = lambda found: float((found - weight).square().sum() / weight.square().sum())  # noqa: E731
    ours = relative(read(quantized_blocks(weight, kind), kind))
    limit = {"2": 0.11, "3": 0.030, "4": 0.0085, "5": 0.0025, "6": 0.0005, "8": 0.00003, "x": 0.013}[kind[1]]
    assert ours < limit, ours
    if kind in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4"):
        theirs = gguf.quants.quantize(weight.numpy(), Q[kind.upper()])
        assert ours <= 1.001 * relative(torch.from_numpy(gguf.quants.dequantize(theirs, Q[kind.upper()])))


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "q8_0"])
def test_importance_moves_the_error_to_inputs_that_count_less(kind):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 512, generator=g) * 0.02
    importance = torch.rand(512, generator=g) ** 8 + 1e-3
    cost = lambda found: float(((found - weight).square() * importance).sum())  # noqa: E731
    plain = read(quantized_blocks(weight, kind), kind)
    weighted = read(quantized_blocks(weight, kind, importance), kind)
    assert cost(weighted) < cost(plain)


@pytest.mark.parametrize("kind", TYPES)
def test_odd_weights(kind):
    weight = torch.zeros(4, 256)
    weight[1] = 0.5
    weight[2, 7] = -3.0
    weight[3] = torch.linspace(1e-7, 2e-7, 256)
    found = read(quantized_blocks(weight, kind, torch.zeros(256)), kind)
    assert torch.isfinite(found).all()
    assert not found[0].any()
    assert (found[1] - 0.5).abs().max() < 0.07
    assert (found[2] - weight[2]).abs().max() < 0.2


@given(seed=st.integers(0, 2**31), bits=st.integers(2, 5), below=st.booleans())
@settings(max_examples=30)
def test_a_searched_range_is_never_worse_than_min_and_max(seed, bits, below):
    g = torch.Generator().manual_seed(seed)
    groups, importance = torch.randn(8, 32, generator=g) + 1, torch.rand(8, 32, generator=g)
    scale, low = affine_range(groups, importance, bits, below_zero=below)
    assert (scale >= 0).all()
    assert not below or (low <= 0).all()

    def cost(scale, low):
        codes = ((groups - low[:, None]) / scale[:, None]).round().clamp(0, 2**bits - 1)
        return (importance * (codes * scale[:, None] + low[:, None] - groups).square()).sum(1)

    lowest = groups.amin(1).clamp(max=0) if below else groups.amin(1)
    plain = cost((groups.amax(1) - lowest) / (2**bits - 1), lowest)
    assert (cost(scale, low) <= plain * (1 + 1e-4) + 1e-7).all()
