"""The compiled CPU kernels against float64, on every instruction set that this machine has."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from products import activations, random_layer
from quantlab_kernels import choose, dispatch, force, native, pack, quantized_linear, unpack

pytestmark = pytest.mark.skipif(native.library() is None, reason="the CPU kernels were not compiled here")

ISAS = native.ISAS[: native.ISAS.index(native.best_isa() or "scalar") + 1]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def by_panels(x, layer) -> bool:
    return choose(x, *layer.arguments[:5]).panels


@pytest.fixture(params=ISAS)
def isa(request):
    with force(f"cpu-{request.param}"):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width(isa, bits, dtype):
    for integers in (True, False):
        layer, x = random_layer(bits, integers=integers), activations(3, 256, dtype)
        layer.assert_right(quantized_linear(x, *layer.arguments), x, rounds_weights=not integers)


@settings(deadline=None, max_examples=150)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 70),
    outputs=st.integers(1, 40),
    # A group of any width, and widths that are no multiple of a kernel's block.
    group=st.sampled_from([1, 2, 7, 8, 16, 24, 32, 33, 64, 96, 128, 200]),
    groups=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from(native.SCALES),
    zeros=st.sampled_from([None, torch.int8, torch.bfloat16, torch.float32]),
    one_scale=st.booleans(),
    integers=st.booleans(),
    bias=st.booleans(),
    rank=st.sampled_from([0, 1, 5, 16]),
    factor_dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.int8]),
    seed=st.integers(0, 100),
)
@pytest.mark.parametrize("isa", ISAS)
def test_any_layer(isa, bits, rows, outputs, group, groups, dtype, one_scale, seed, integers, **options):
    layer = random_layer(
        bits,
        outputs,
        group * groups,
        groups,
        integers=integers,
        scale_rows=1 if one_scale else None,
        seed=seed,
        **options,
    )
    x = activations(rows, group * groups, dtype, seed)
    with force(f"cpu-{isa}"):
        rounds_weights = by_panels(x, layer) or (dtype == torch.bfloat16 and not integers)
        layer.assert_right(quantized_linear(x, *layer.arguments), x, rounds_weights=rounds_weights)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 17, 32, 33, 64, 128, 300, 600])
def test_any_number_of_rows(isa, rows):
    layer, x = random_layer(rows=70, columns=576, groups=9), activations(rows, 576)
    layer.assert_right(quantized_linear(x, *layer.arguments), x, rounds_weights=by_panels(x, layer))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 40])
class TestHostileNumbers:
    def test_zeros(self, isa, rows, dtype):
        layer = random_layer(bias=True)
        y = quantized_linear(torch.zeros(rows, 256, dtype=dtype), *layer.arguments)
        assert torch.equal(y, layer.bias.to(dtype).expand_as(y))

    def test_one_huge_value(self, isa, rows, dtype):
        layer, x = random_layer(), activations(rows, 256, dtype)
        x[0, 100] = 1e4
        layer.assert_right(quantized_linear(x, *layer.arguments), x, rounds_weights=by_panels(x, layer))

    def test_subnormal_scales(self, isa, rows, dtype):
        layer, x = random_layer(scale_dtype=torch.float16), activations(rows, 256, dtype)
        layer.scales.copy_(layer.scales * 2.0**-20)
        assert layer.scales.float().abs().max() < torch.finfo(torch.float16).smallest_normal
        x *= 2.0**8
        layer.assert_right(quantized_linear(x, *layer.arguments), x, rounds_weights=by_panels(x, layer))

    def test_negative_scales(self, isa, rows, dtype):
        layer, x = random_layer(), activations(rows, 256, dtype)
        layer.scales[::2] *= -1
        layer.assert_right(quantized_linear(x, *layer.arguments), x, rounds_weights=by_panels(x, layer))


def test_exact_where_everything_is_representable(isa):
    """Small integers: any error is a mistake of indexing, not of rounding."""
    for bits in range(1, 9):
        layer = random_layer(bits, columns=320, groups=5)
        layer.scales.fill_(0.5)
        x = torch.randint(-3, 4, (5, 320), generator=torch.Generator().manual_seed(bits)).float()
        assert torch.equal(quantized_linear(x, *layer.arguments).double(), layer.product(x)[0])


@pytest.mark.parametrize("first", [-128, -127, -40, 0])
def test_eight_bits_are_exact_whatever_the_first_integer_is(isa, first):
    """Sums of two look-ups: what is zero takes no precision from the others, however large its activation is."""
    layer = random_layer(8, table_size=min(256, 128 - first), scale_dtype=torch.float32)
    layer = dataclasses.replace(layer, table=torch.arange(layer.table.numel()).float() + first)
    codes = unpack(layer.codes, 8, 256)
    x = activations(3, 256)
    x[:, 7] = 2.0**20
    codes[:, 7] = -first
    layer = dataclasses.replace(layer, codes=pack(codes, 8))
    layer.assert_right(quantized_linear(x, *layer.arguments), x)
    x = activations(40, 256)
    layer.assert_right(quantized_linear(x, *layer.arguments), x, rounds_weights=by_panels(x, layer))


def test_rows_that_are_longer_than_a_panel(isa):
    for bits in range(1, 9):
        layer = random_layer(bits, rows=133, columns=4160, groups=65, zeros=torch.int8, bias=True, rank=3)
        x = activations(45, 4160)
        layer.assert_right(quantized_linear(x, *layer.arguments), x, rounds_weights=True)


def test_a_row_of_a_panel_does_not_depend_on_the_others(isa):
    layer, x = random_layer(rows=70, columns=576, groups=9), activations(300, 576)
    if isa != "avx512":
        pytest.skip("torch multiplies the panels of the others")
    whole = quantized_linear(x, *layer.arguments)
    for begin, end in ((0, 8), (3, 40), (250, 300)):
        assert torch.equal(quantized_linear(x[begin:end], *layer.arguments), whole[begin:end])


@pytest.mark.parametrize("rows", [1, 3, 8, 32, 300])
def test_the_same_bits_with_any_number_of_threads(isa, rows):
    layer, x = random_layer(rows=300, columns=512, groups=8, rank=4, bias=True), activations(rows, 512)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(quantized_linear(x, *layer.arguments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], y) for y in results[1:])


def test_leading_dimensions_and_strides(isa):
    layer, x = random_layer(), activations(12, 512)[:, ::2].view(3, 4, 256)
    assert not x.is_contiguous()
    y = quantized_linear(x, *layer.arguments)
    assert y.shape == (3, 4, 24)
    assert torch.equal(y.flatten(0, 1), quantized_linear(x.reshape(12, 256), *layer.arguments))


def test_tensors_that_are_not_contiguous(isa):
    layer = random_layer(zeros=torch.int8, bias=True)
    codes, scales, zeros, table, bits, bias, _ = layer.arguments
    apart = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in (codes, scales, zeros, table)]
    assert not any(tensor.is_contiguous() for tensor in apart)
    for rows in (2, 40):
        x = activations(rows, 256)
        assert torch.equal(quantized_linear(x, *apart, bits, bias), quantized_linear(x, *layer.arguments))


def test_no_rows(isa):
    layer = random_layer()
    assert quantized_linear(torch.empty(2, 0, 256), *layer.arguments).shape == (2, 0, 24)


def test_a_table_that_is_shorter_than_codes_allow(isa):
    layer, x = random_layer(4, table_size=15), activations(2, 256)
    layer.assert_right(quantized_linear(x, *layer.arguments), x)


class TestChoice:
    def test_names_the_best_instruction_set(self):
        layer = random_layer()
        assert choose(activations(1, 256), *layer.arguments[:5]).kernel == f"cpu-{native.best_isa()}"

    def test_many_rows_are_multiplied_by_panels(self, isa):
        layer = random_layer()
        for dtype in DTYPES:
            few = 7 if (isa, dtype) == ("avx512", torch.bfloat16) else 32
            assert not by_panels(activations(1, 256, dtype), layer)
            assert not by_panels(activations(few, 256, dtype), layer)
            assert by_panels(activations(few + 1, 256, dtype), layer)

    def test_is_what_was_forced(self, isa):
        layer = random_layer()
        assert choose(activations(1, 256), *layer.arguments[:5]).kernel == f"cpu-{isa}"

    def test_falls_to_the_next_where_a_kernel_cannot(self):
        layer = random_layer(columns=260, groups=20)  # groups of 13
        assert choose(activations(1, 260), *layer.arguments[:5]).kernel == "cpu-scalar"

    def test_a_table_that_bfloat16_cannot_hold_is_not_rounded_for_finer_activations(self):
        layer = random_layer(integers=False)
        assert choose(activations(1, 256, torch.float32), *layer.arguments[:5]).kernel != "cpu-avx512"

    def test_reference_can_be_forced_and_says_so(self):
        layer = random_layer()
        with force("reference"):
            assert str(choose(activations(1, 256), *layer.arguments[:5])) == "reference (forced)"

    def test_an_unknown_kernel_in_the_environment_is_refused_when_it_is_used(self, monkeypatch):
        monkeypatch.setattr(dispatch, "_forced", "cpu-mmx")
        with pytest.raises(ValueError, match="'cpu-mmx': use one of"):
            choose(activations(1, 256), *random_layer().arguments[:5])

    def test_an_unknown_kernel_is_refused(self):
        with pytest.raises(ValueError, match="'cpu-mmx': use one of"), force("cpu-mmx"):
            pass
