"""Activations of 8 bits against a model, in float64, of exactly this arithmetic, and how far it is from none at all."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from products import Layer, activations, random_layer
from quantlab_kernels import choose, force, native, quantized_linear

NAME = f"cpu-{native.INT8}"
SHARING = 32  # inputs with one scale


def chosen(x: torch.Tensor, layer: Layer) -> str:
    with force(NAME):
        return choose(x, *layer.arguments[:5]).kernel


pytestmark = pytest.mark.skipif(
    native.library() is None or chosen(activations(1, 256), random_layer()) != NAME,
    reason="needs AVX-512 VNNI, and the CPU kernels",
)


def product(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    assert chosen(x, layer) == NAME
    with force(NAME):
        return quantized_linear(x, *layer.arguments)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What the kernel makes of activations; the scale is computed as there, in float32."""
    columns = x.shape[-1]
    blocks = torch.nn.functional.pad(x.float(), (0, -columns % SHARING)).unflatten(-1, (-1, SHARING))
    most = blocks.abs().amax(-1, keepdim=True)
    codes = torch.where(most > 0, (blocks * (torch.tensor(127.0) / most)).round(), torch.zeros(()))
    assert codes.abs().max() <= 127
    return (codes.double() * (most * torch.tensor(1 / 127)).double()).flatten(-2)[..., :columns]


def assert_right(y: torch.Tensor, x: torch.Tensor, layer: Layer) -> None:
    """``y`` is the product of the rounded activations, but for sums in float32 and one rounding."""
    plain = dataclasses.replace(layer, low_rank=None, bias=None)
    expected, size = layer.product(x)  # the rest of the product sees what was given
    expected = expected - plain.product(x)[0] + plain.product(rounded(x))[0]
    # Codes count from 0 here: they are multiplied before the table's first entry is taken off.
    spread = layer.scales.float().double().abs().amax() * 2 * layer.table.abs().max() * x.double().abs().sum(-1, True)
    allowed = torch.finfo(y.dtype).eps / 2 * expected.abs() + 2.0**-18 * (size + spread)
    assert ((y.double() - expected).abs() <= allowed).all()


@settings(deadline=None, max_examples=150)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 32),
    outputs=st.integers(1, 40),
    group=st.sampled_from([32, 64, 96, 128, 160, 256]),
    groups=st.integers(1, 6),
    dtype=st.sampled_from(native.ACTIVATIONS),
    scale_dtype=st.sampled_from(native.SCALES),
    zeros=st.sampled_from([None, torch.int8, torch.bfloat16]),
    one_scale=st.booleans(),
    bias=st.booleans(),
    rank=st.sampled_from([0, 5]),
    seed=st.integers(0, 100),
)
def test_any_layer(bits, rows, outputs, group, groups, dtype, one_scale, seed, **options):
    layer = random_layer(
        bits, outputs, group * groups, groups, scale_rows=1 if one_scale else None, seed=seed, **options
    )
    x = activations(rows, group * groups, dtype, seed)
    assert_right(product(x, layer), x, layer)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 31, 33, 100, 1000])
def test_any_width(bits, columns):
    layer, x = random_layer(bits, 6, columns, 1), activations(3, columns)
    assert_right(product(x, layer), x, layer)


@pytest.mark.parametrize("group", [4, 8, 12, 40])
def test_groups_that_share_activations_scales(group):
    layer, x = random_layer(6, 6, 240, 240 // group), activations(3, 240)
    assert_right(product(x, layer), x, layer)


def test_exact_where_activations_are_integers():
    """Each 32 of them reach to 127, so nothing is rounded: any error is a mistake of indexing."""
    for bits in range(1, 9):
        layer = random_layer(bits, columns=320, groups=5)
        layer.scales.fill_(0.5)
        x = torch.randint(-126, 127, (5, 320), generator=torch.Generator().manual_seed(bits)).float()
        x[:, ::SHARING] = 127
        y, (expected, size) = product(x, layer), layer.product(x)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=float(size.max()) * 2**-20)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_as_close_to_the_exact_product_as_is_said(bits):
    """docs/kernels.md: half a step of 1/127 of the largest of 32, for each activation."""
    layer, x = random_layer(bits, 64, 1024, 16), activations(8, 1024, torch.float32)
    expected, size = layer.product(x)
    error = product(x, layer).double() - expected
    most = x.unflatten(-1, (-1, SHARING)).abs().amax(-1, keepdim=True).expand(-1, -1, SHARING).flatten(1).double()
    assert (error.abs() <= most / 254 @ layer.weight().abs().T + 2.0**-18 * size).all()
    assert error.norm() < 0.01 * expected.norm()  # of normally distributed ones


@pytest.mark.parametrize("rows", [1, 4, 9])
class TestHostileNumbers:
    def test_zeros(self, rows):
        layer = random_layer(bias=True)
        x = torch.zeros(rows, 256)
        assert torch.equal(product(x, layer), layer.bias.expand(rows, -1))

    def test_one_huge_value(self, rows):
        layer, x = random_layer(), activations(rows, 256)
        x[0, 100] = 1e4
        assert_right(product(x, layer), x, layer)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_a_number_is_seen_in_its_row_only(self, rows, value):
        layer, x = random_layer(), activations(rows, 256)
        x[0, 100] = value
        y = product(x, layer)
        assert not y[0].isfinite().any()
        assert y[1:].isfinite().all()

    def test_tiny_activations_are_zero(self, rows):
        layer = random_layer()
        assert not product(torch.full((rows, 256), 2.0**-120), layer).any()


@pytest.mark.parametrize("rows", [1, 8])
def test_the_same_bits_with_any_number_of_threads(rows):
    layer, x = random_layer(rows=300, columns=512, groups=8, bias=True), activations(rows, 512)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(product(x, layer))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], y) for y in results[1:])


class TestChoice:
    def test_is_never_made_unasked(self):
        assert choose(activations(1, 256), *random_layer().arguments[:5]).kernel == "cpu-avx512"

    def test_tables_that_are_not_consecutive_integers_go_to_the_exact_kernel(self):
        x, layer = activations(1, 256), random_layer(integers=False)
        assert chosen(x, layer) == "cpu-avx512"
        with force(NAME):
            y = quantized_linear(x, *layer.arguments)
        assert torch.equal(y, quantized_linear(x, *layer.arguments))

    def test_many_rows_too(self):
        x, layer = activations(64, 256), random_layer()
        with force(NAME):
            assert str(choose(x, *layer.arguments[:5])) == "cpu-avx512 by panels"
            layer.assert_right(quantized_linear(x, *layer.arguments), x, rounds_weights=True)
