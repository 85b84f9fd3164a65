"""Activations of 8 bits: how rows are rounded, and products with them, against float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from products import Layer, activations, random_layer
from quantlab_kernels import (
    ACTIVATIONS,
    KERNELS,
    choose,
    force,
    native,
    onednn,
    pack,
    quantize_rows,
    quantized_linear,
    rounded,
)

from quantlab.numerics import grid

LARGEST = {"int8": 127.0, "fp8": 448.0}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = list(ACTIVATIONS)
ONEDNN = pytest.mark.skipif(not onednn.available(), reason="needs oneDNN and a processor with VNNI")


def naive(row: np.ndarray, kind: str) -> tuple[np.ndarray, float]:
    """One row by the definition, in float64: what its numbers become, before they are multiplied by the scale again."""
    scale = np.abs(row).max() / LARGEST[kind]
    if scale == 0:
        return np.zeros_like(row), 0.0
    ratio = row / scale
    return (np.rint(ratio) if kind == "int8" else ratio.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)), scale


def steps_of(kind: str, codes: np.ndarray) -> np.ndarray:
    """How far apart the numbers are, around each of ``codes``."""
    if kind == "int8":
        return np.ones_like(codes)
    return np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(codes), 2.0**-9))), -6) - 3)


@settings(deadline=None, max_examples=100)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 4),
    columns=st.integers(1, 40),
    spread=st.sampled_from([0.0, 1.0, 6.0]),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 10_000),
)
def test_rows_are_rounded_to_the_nearest(kind, dtype, rows, columns, spread, size, seed):
    generator = torch.Generator().manual_seed(seed)
    x, size_of = torch.randn(2, rows, columns, generator=generator)
    x = (x * (spread * size_of).exp() * size).clamp(-6e4, 6e4).to(dtype)
    codes, scales = quantize_rows(x, ACTIVATIONS[kind])
    assert codes.dtype == ACTIVATIONS[kind]
    assert scales.dtype == torch.float32
    for row, found, scale in zip(x.double().numpy(), codes.double().numpy(), scales.tolist(), strict=True):
        expected, exact = naive(row, kind)
        assert scale == pytest.approx(exact, rel=2**-23)
        assert np.abs(found).max() == (LARGEST[kind] if exact else 0)
        # The scale and the ratio are float32: only a number that lies as close to a border may go the other way.
        ratio = row / exact if exact else row
        off = np.abs(found - ratio)
        steps = steps_of(kind, np.maximum(np.abs(found), np.abs(expected)))
        assert (off <= np.abs(expected - ratio) + np.abs(ratio) * 2.0**-22).all()
        assert (off <= steps / 2 + np.abs(ratio) * 2.0**-22).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
class TestOddRows:
    def test_zeros_are_zeros(self, kind, dtype):
        codes, scales = quantize_rows(torch.tensor([[0.0, -0.0], [1.0, -2.0]], dtype=dtype), ACTIVATIONS[kind])
        assert codes[0].float().tolist() == [0, 0]
        assert scales[0] == 0
        assert codes[1, 1].float() == -LARGEST[kind]

    @pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
    def test_what_is_no_number_makes_its_row_none_and_no_other(self, kind, dtype, odd):
        x = torch.tensor([[1.0, odd, -3.0], [1.0, 2.0, -3.0]], dtype=dtype)
        y = rounded(x, kind)
        assert y[0].isnan().all()
        assert torch.equal(y[1:], rounded(x[1:], kind))

    def test_the_smallest_numbers_become_zeros_or_stay_near(self, kind, dtype):
        tiny = torch.finfo(dtype).smallest_normal
        x = torch.tensor([[tiny, -tiny / 2], [1024 * tiny, tiny]], dtype=dtype)
        y = rounded(x, kind)
        assert y.isfinite().all()
        assert (y.abs() <= x.abs().amax(1, keepdim=True)).all()
        assert y[1, 0] == x[1, 0]

    def test_no_rows_are_no_rows(self, kind, dtype):
        codes, scales = quantize_rows(torch.empty(0, 5, dtype=dtype), ACTIVATIONS[kind])
        assert codes.shape == (0, 5)
        assert scales.shape == (0,)


@settings(deadline=None, max_examples=100)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    size=st.sampled_from([1e-39, 1e-6, 1.0, 1e4]),
    odd=st.sampled_from([None, 0.0, float("nan"), float("inf"), -float("inf"), 3e38]),
    seed=st.integers(0, 10_000),
)
def test_the_compiled_loop_rounds_as_torch_does(dtype, rows, columns, size, odd, seed):
    x = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    if odd is not None:
        x[seed % rows, seed % columns] = odd
    codes, scales = quantize_rows(x, torch.int8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "round_rows", lambda _: None)
        expected, expected_scales = quantize_rows(x, torch.int8)
    assert torch.equal(codes, expected)
    assert torch.equal(scales.nan_to_num(7, 8, 9), expected_scales.nan_to_num(7, 8, 9))


def test_ties_go_to_even():
    codes, _ = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]), torch.int8)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2]]
    codes, _ = quantize_rows(torch.tensor([[448.0, 17.0, 19.0, -17.0, 2.0**-10]]), torch.float8_e4m3fn)  # 16, 18, 20
    assert codes.float().tolist() == [[448, 16, 20, -16, 0]]


@settings(deadline=None, max_examples=50)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 1000), power=st.integers(-20, 20))
def test_rounding_twice_changes_nothing_and_powers_of_two_pass_through(kind, seed, power):
    x = torch.randn(3, 17, generator=torch.Generator().manual_seed(seed))
    codes, scales = quantize_rows(x, ACTIVATIONS[kind])
    larger, their_scales = quantize_rows(x * 2.0**power, ACTIVATIONS[kind])
    assert torch.equal(codes.float(), larger.float())
    assert torch.equal(scales * 2.0**power, their_scales)
    again, _ = quantize_rows(codes.float(), ACTIVATIONS[kind])
    assert torch.equal(again.float(), codes.float())


def layer_for(kind: str, bits: int = 8, **options) -> Layer:
    """A random layer that such activations can meet: integers of some width, or e4m3; one scale a row or one in all."""
    made = random_layer(bits, groups=1, **options)
    if kind == "int8":
        return made
    table = grid("e4m3").values
    codes = torch.randint(0, len(table), (len(made.codes), made.columns), generator=torch.Generator().manual_seed(3))
    codes = pack(codes.to(torch.uint8), 8)
    return Layer(codes, made.scales, None, table, 8, made.bias, made.low_rank, made.columns)


def product(x: torch.Tensor, layer: Layer, kind: str) -> torch.Tensor:
    offset = -(len(layer.table) // 2) if kind == "int8" else 0
    return quantized_linear(x, *layer.arguments, offset=offset, activations=kind)


def assert_right(y: torch.Tensor, x: torch.Tensor, layer: Layer, kind: str) -> None:
    """``y`` is the product with ``x`` as it is rounded, but for sums in float32 and two roundings of the result."""
    codes, scales = quantize_rows(x.reshape(-1, x.shape[-1]), ACTIVATIONS[kind])
    used = codes.double() * scales.double().unsqueeze(1)
    expected, size = used @ layer.weight().T, used.abs() @ layer.weight().abs().T
    slack = torch.zeros_like(expected)
    if layer.low_rank is not None:  # which sees what was given, in the activations' type
        left, right = (factor.double() for factor in layer.low_rank)
        plain = x.reshape(-1, x.shape[-1]).double()
        expected = expected + plain @ right.T @ left.T
        slack += plain.abs() @ right.abs().T @ left.abs().T
    if layer.bias is not None:
        expected, size = expected + layer.bias.double(), size + layer.bias.double().abs()
    eps = torch.finfo(x.dtype).eps
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], len(layer.codes))
    allowed = 2 * eps * expected.abs() + (eps if x.dtype == torch.bfloat16 else 2.0**-18) * size + 2 * eps * slack
    error = (y.reshape(expected.shape).double() - expected).abs()
    assert (error <= allowed).all(), (error / allowed).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", [None, *KERNELS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_every_kernel_multiplies_what_rows_are_rounded_to(kind, kernel, dtype, rows):
    layer, x = layer_for(kind, bias=True, rank=3), activations(rows, 256, dtype)
    with force(kernel):
        assert_right(product(x, layer, kind), x, layer, kind)


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 9),
    outputs=st.integers(1, 40),
    columns=st.integers(1, 200),
    one_scale=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 100),
)
def test_any_layer_of_integers(bits, rows, outputs, columns, one_scale, dtype, seed):
    layer = layer_for("int8", bits, rows=outputs, columns=columns, scale_rows=1 if one_scale else None, seed=seed)
    x = activations(rows, columns, dtype, seed).unsqueeze(0)
    assert_right(product(x, layer, "int8"), x, layer, "int8")


@ONEDNN
def test_integers_are_summed_exactly():
    """The largest sums that there can be: float32 could not add them up one by one."""
    layer = random_layer(8, 6, 2048, 1, scale_dtype=torch.float32)
    layer.codes.fill_(255)
    layer.codes[:, ::7] = 254
    x = torch.full((2, 2048), 127.0)
    x[0, 1::3] = 126
    codes = layer.table[layer.codes.int()].long()
    exact = (x.long() @ codes.T).double() * layer.scales.flatten().double()
    assert choose(x, *layer.arguments[:5], activations="int8").kernel == "cpu-onednn"
    torch.testing.assert_close(product(x, layer, "int8").double(), exact, rtol=2**-22, atol=0)


@ONEDNN
def test_a_weight_that_changed_is_prepared_again_and_forgotten_with_its_codes():
    layer, x = layer_for("int8"), activations(4, 256)
    before = len(onednn._kept._entries)
    first = product(x, layer, "int8")
    assert len(onednn._kept._entries) == before + 1
    layer.codes.bitwise_xor_(255)
    second = product(x, layer, "int8")
    assert not torch.equal(first, second)
    assert_right(second, x, layer, "int8")
    del layer
    assert len(onednn._kept._entries) == before


def test_the_choice_is_told():
    x = activations(3, 256)
    best = choose(x, *layer_for("int8").arguments[:5])
    assert choose(x, *layer_for("fp8").arguments[:5], activations="fp8").kernel == best.kernel
    expected = "cpu-onednn" if onednn.available() else best.kernel
    assert choose(x, *layer_for("int8").arguments[:5], activations="int8").kernel == expected
    if native.library() is not None:  # one row alone is read faster from the codes as they are stored
        assert choose(x[:1], *layer_for("int8").arguments[:5], activations="int8").kernel == best.kernel
    groups = random_layer(8, groups=4)  # sums of several scales are no sums of integers
    assert choose(x, *groups.arguments[:5], activations="int8").kernel == best.kernel
    with force("reference"):
        assert choose(x, *layer_for("int8").arguments[:5], activations="int8").kernel == "reference"
    with force("cpu-avx512-int8"):  # which would round them another way
        assert "int8" not in choose(x, *layer_for("int8").arguments[:5], activations="int8").kernel


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0, 3])
def test_keeps_the_rules_of_an_op(kind, rank):
    codes, scales, zeros, table, bits, bias, factors = layer_for(kind, rank=rank, bias=bool(rank)).arguments
    arguments = (activations(5, 256), codes, scales, zeros, table, bits, 0, bias, *(factors or (None, None)), kind)
    op = torch.ops.quantlab.linear_dynamic.default
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


class Model(torch.nn.Module):
    """Two products with something in between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = layer_for("int8", rows=256), layer_for("fp8", rows=8, bias=True, rank=3)

    def forward(self, x):
        return product(product(x, self.first, "int8").relu(), self.second, "fp8")


def test_is_one_op_in_an_exported_program():
    program = torch.export.export(Model(), (activations(3, 256),), strict=False)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.quantlab.linear_dynamic.default) == 2


def test_compiles_without_a_break():
    model, x = Model(), activations(3, 256)
    with torch.inference_mode():
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_takes_no_notice_of_rounding(kind):
    layer, x = layer_for(kind), activations(2, 256, torch.float32).requires_grad_()
    y = product(x, layer, kind)
    assert torch.equal(y.detach(), product(x.detach(), layer, kind))
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight().sum(0).float().expand(2, -1), rtol=1e-5, atol=1e-4)
