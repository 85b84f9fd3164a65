"""The kernels in Triton's interpreter, against float64. Not collected by itself: ``test_interpreter.py`` runs it in a
process of its own, because ``TRITON_INTERPRET`` must be set before Triton is imported.

The interpreter computes bfloat16 only through float32, truncates where it rounds to it, and knows no inline asm:
results are taken in float32, and the decodes are the plain twins of those that ``test_ptx.py`` runs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from quantlab_kernels.activations import quantize_rows
from quantlab_kernels.gpu import matmul, plans, w8a8
from quantlab_kernels.gpu.configs import GemmConfig, GemvConfig, PanelConfig, W8A8Config
from quantlab_kernels.gpu.weight import prepare
from quantlab_kernels.packing import pack
from quantlab_kernels.reference import quantized_linear

from quantlab.numerics import grid

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_interpreter.py"

GEMV = GemvConfig(32, 128)
GEMM = GemmConfig(16, 32, 128, 1, 1)
KERNELS = [GEMV, GEMM]
DTYPES = [torch.float16, torch.bfloat16]
# Half a unit in the last place of a number of the activations' dtype; a whole one of bfloat16, which is truncated here.
HALF_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}


@dataclass
class Layer:
    """A random quantized layer and what it is in float64."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    table: torch.Tensor
    bits: int
    offset: int | None
    bias: torch.Tensor | None
    low_rank: tuple[torch.Tensor, torch.Tensor] | None

    def exact(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The product in float64, and the sum of the magnitudes of all that is added."""
        rows, columns = self.codes.shape
        groups = self.scales.shape[1]
        values = self.table.double()[self.codes.long()].view(rows, groups, columns // groups)
        if self.zeros is not None:
            values = values - self.zeros.double().unsqueeze(-1)
        weight = (values * self.scales.double().unsqueeze(-1)).reshape(rows, columns)
        y, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
        if self.low_rank is not None:
            left, right = (factor.double() for factor in self.low_rank)
            y = y + x.double() @ right.T @ left.T
            size = size + x.double().abs() @ right.abs().T @ left.abs().T
        if self.bias is not None:
            y, size = y + self.bias.double(), size + self.bias.double().abs()
        return y, size

    def product(self, x: torch.Tensor, config, splits: int = 1, dtype=torch.float32) -> torch.Tensor:
        weight = prepare(
            pack(self.codes, self.bits), self.scales, self.zeros, self.table, self.bits, self.offset,
            self.codes.shape[1], self.bias, self.low_rank,
        )  # fmt: skip
        return matmul.product(x, weight, config=config, splits=splits, dtype=dtype)


def integer(bits: int) -> tuple[int, torch.Tensor, int]:
    lowest = -(1 << (bits - 1))
    return bits, torch.arange(lowest, -lowest, dtype=torch.float32), lowest


FORMATS = {
    **{f"int{bits}": integer(bits) for bits in range(2, 9)},
    "int3-narrow": (3, grid("int3-narrow").values, -3),
    "e3m2": (6, grid("e3m2").values, None),
    "e2m3": (6, grid("e2m3").values, None),
    "nf4": (4, grid("nf4").values, None),
    "nf3": (3, grid("nf3").values, None),
    "nf2": (2, torch.tensor([-1.0, 0.0, 0.3, 1.0]), None),
    "power6": (6, torch.linspace(-1, 1, 63).sign() * torch.linspace(-1, 1, 63).abs() ** 2.5, None),
    "nf5": (5, torch.linspace(-1, 1, 32) ** 3, None),
    "e4m3": (8, grid("e4m3").values, None),
}


def layer(name="int4", rows=24, columns=256, groups=2, *, zeros=False, bias=False, rank=0, dtype=torch.float16, seed=0):
    bits, table, offset = FORMATS[name]
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, len(table), (rows, columns), generator=generator).to(torch.uint8)
    scales = torch.rand(rows, groups, generator=generator) + 0.1
    found = torch.randint(-3, 4, (rows, groups), generator=generator).to(torch.int8) if zeros else None
    factors = None
    if rank:
        factors = tuple(torch.randn(s, generator=generator).to(dtype) for s in ((rows, rank), (rank, columns)))
    return Layer(codes, scales, found, table, bits, offset, torch.randn(rows) if bias else None, factors)


def activations(rows: int, columns: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(y: torch.Tensor, exact: tuple[torch.Tensor, torch.Tensor], of_size: float) -> None:
    """Within ``of_size`` of all that was added, and nothing that is not a number."""
    expected, size = exact
    error = (y.double() - expected).abs()
    worst = float((error / size.clamp(min=1e-300)).max())
    assert bool((error <= of_size * size).all()), f"off by {worst:.2e} of what was added, {of_size:.2e} allowed"


def tolerance(name: str, config, dtype: torch.dtype) -> float:
    """Float32 sums, and what the format is rounded to (see ``Reading``); scales and weights for tensor cores, too."""
    if isinstance(config, GemmConfig):
        return 2 * HALF_UNIT[dtype]
    bits, _, offset = FORMATS[name]
    in_registers = offset is None and bits <= 4
    return 2.0**-21 if not in_registers else 2.0**-8 if dtype == torch.bfloat16 else 2.0**-13


@pytest.mark.parametrize("dtype", DTYPES, ids=["f16", "bf16"])
@pytest.mark.parametrize("config", KERNELS, ids=["gemv", "gemm"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name, config, dtype):
    subject, x = layer(name), activations(1, 256, dtype)
    assert_near(subject.product(x, config), subject.exact(x), tolerance(name, config, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=["f16", "bf16"])
@pytest.mark.parametrize("config", KERNELS, ids=["gemv", "gemm"])
@pytest.mark.parametrize("name", ["int2", "int3", "int4", "int8", "e3m2", "nf4", "power6"])
def test_zeros_bias_and_low_rank_in_two_shares(name, config, dtype):
    columns = 8192 if name in ("int2", "int3", "e3m2", "power6") and config is GEMV else 2048
    subject = layer(name, 20, columns, columns // 128, zeros=True, bias=True, rank=3, dtype=dtype)
    x = activations(2, columns, dtype)
    of_size = tolerance(name, config, dtype) + (HALF_UNIT[dtype] if config is GEMM else 0)
    assert_near(subject.product(x, config, splits=2), subject.exact(x), of_size)


@pytest.mark.parametrize("config", KERNELS, ids=["gemv", "gemm"])
def test_a_high_rank_and_more_outputs_than_a_program_adds(config):
    subject, x = layer("int4", 300, rank=67), activations(1, 256, torch.float16)
    assert_near(subject.product(x, config), subject.exact(x), 3 * HALF_UNIT[torch.float16])


@pytest.mark.parametrize("config", KERNELS, ids=["gemv", "gemm"])
@pytest.mark.parametrize(("columns", "groups"), [(100, 1), (576, 1), (36, 1), (192, 2), (320, 10), (1024, 2), (256, 8)])
def test_groups_and_inputs_that_are_no_multiple_of_a_tile(columns, groups, config):
    for name in ("int4", "int3", "e3m2"):
        if columns // groups % 32 and groups > 1:
            continue
        subject, x = layer(name, 5, columns, groups, zeros=True), activations(1, columns, torch.float16)
        assert_near(subject.product(x, config), subject.exact(x), tolerance(name, config, torch.float16))


@pytest.mark.parametrize("dtype", DTYPES, ids=["f16", "bf16"])
@pytest.mark.parametrize("name", FORMATS)
def test_panels_of_every_format(name, dtype, monkeypatch):
    """Three panels, the last of them shorter, written into columns of the result."""
    monkeypatch.setattr(plans, "PANEL_BYTES", 8 * 2 * 256)
    subject, x = layer(name, 20, bias=True, rank=3, zeros=name == "int4", dtype=dtype), activations(5, 256, dtype)
    y = subject.product(x, PanelConfig(8, 32, 1), dtype=dtype)
    assert_near(y, subject.exact(x), 4 * HALF_UNIT[dtype])


@pytest.mark.parametrize(("columns", "groups"), [(100, 1), (36, 1), (320, 10), (1024, 2), (256, 8)])
def test_panels_of_groups_and_inputs_that_are_no_multiple_of_a_tile(columns, groups):
    for name in ("int4", "int3", "e3m2"):
        if columns // groups % 32 and groups > 1:
            continue
        subject, x = layer(name, 5, columns, groups, zeros=True), activations(3, columns, torch.float16)
        y = subject.product(x, PanelConfig(4, 8, 1), dtype=torch.float16)
        assert_near(y, subject.exact(x), 3 * HALF_UNIT[torch.float16])


def test_weights_that_float16_has_no_room_for_are_not_put_into_panels():
    """A row of 1e-4 would lose its digits as a subnormal number; the GEMM takes a power of two out of it."""
    subject, x = layer("int4"), activations(3, 256, torch.float16)
    subject.scales[3] = 1e-6
    y = subject.product(x, PanelConfig(8, 32, 1), dtype=torch.float16).double()
    exact, size = subject.exact(x)
    allowed = 2 * HALF_UNIT[torch.float16] * size + 2.0**-25  # of the smallest numbers there are
    assert bool(((y - exact).abs() <= allowed).all())


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 33, 64, 300])
def test_rows_as_the_static_choice_has_them(rows):
    subject, x = layer("int4", 72, 256, 2, bias=True), activations(rows, 256, torch.float16)
    assert_near(subject.product(x, None, splits=None), subject.exact(x), 2 * HALF_UNIT[torch.float16])


@pytest.mark.parametrize("shape", [(1, 1), (24, 1)], ids=["tensor", "row"])
@pytest.mark.parametrize("config", KERNELS, ids=["gemv", "gemm"])
def test_one_scale_for_a_row_or_for_all(config, shape):
    subject, x = layer("int4", groups=1, zeros=True), activations(1, 256, torch.bfloat16)
    subject.scales, subject.zeros = subject.scales[: shape[0]], subject.zeros[: shape[0]]
    y = subject.product(x, config)
    subject.scales, subject.zeros = subject.scales.expand(24, 1), subject.zeros.expand(24, 1)
    assert_near(y, subject.exact(x), tolerance("int4", config, torch.bfloat16))


# --- inputs that are made to break things ---


@pytest.mark.parametrize("dtype", DTYPES, ids=["f16", "bf16"])
@pytest.mark.parametrize("config", KERNELS, ids=["gemv", "gemm"])
@pytest.mark.parametrize("name", ["int4", "int2", "e3m2", "nf4"])
def test_nothing_gives_nothing(name, config, dtype):
    subject = layer(name)
    assert not subject.product(torch.zeros(1, 256, dtype=dtype), config).any()
    subject.scales = torch.zeros_like(subject.scales)
    assert not subject.product(activations(1, 256, dtype), config).any()


@pytest.mark.parametrize(("dtype", "huge"), [(torch.float16, 65504.0), (torch.bfloat16, 1e30)], ids=["f16", "bf16"])
@pytest.mark.parametrize("config", KERNELS, ids=["gemv", "gemm"])
@pytest.mark.parametrize("name", ["int4", "int3", "int8", "e2m3", "nf4", "power6"])
def test_one_huge_activation(name, config, dtype, huge):
    subject, x = layer(name), activations(1, 256, dtype)
    x[0, 77] = huge
    y, (expected, size) = subject.product(x, config), subject.exact(x)
    of_size = tolerance(name, config, dtype)
    # Offsets are subtracted from sums, so float32 sums hold the huge one times the largest entry, whatever its weight.
    passing = huge * float(subject.table.abs().max()) * subject.scales.double().amax(1)
    # (And of a table in registers, an entry near zero is off by a share of the largest.)
    share = 2.0**-15 if name == "nf4" else 2.0**-22
    assert_near(y, (expected, size + passing * share / of_size), of_size)
    if dtype == torch.float16:  # and that is still nothing next to the rounding of the result
        assert_near(y, (expected, size), 2 * HALF_UNIT[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=["f16", "bf16"])
@pytest.mark.parametrize("config", KERNELS, ids=["gemv", "gemm"])
@pytest.mark.parametrize("scale", [1e-41, 1e-30, 6e-8, 1e30])
def test_scales_that_no_half_holds(scale, config, dtype):
    subject, x = layer("int4", zeros=True), activations(1, 256, dtype)
    subject.scales = subject.scales * scale
    y, (expected, size) = subject.product(x, config), subject.exact(x)
    # The result is a float32, which is subnormal itself for the smallest.
    assert_near(
        y, (expected, size + 2.0**-148 / tolerance("int4", config, dtype)), 2 * tolerance("int4", config, dtype)
    )


@pytest.mark.parametrize("config", KERNELS, ids=["gemv", "gemm"])
def test_subnormal_activations(config):
    subject, x = layer("int4"), (activations(1, 256, torch.float32) * 2.0**-22).half()
    assert_near(subject.product(x, config), subject.exact(x), tolerance("int4", config, torch.float16))


def test_shares_change_nothing_but_the_order_of_a_sum():
    subject, x = layer("int4", 8, 4096, 32), activations(1, 4096, torch.float16)
    results = [subject.product(x, GEMV, splits=splits) for splits in (1, 2, 4, 4)]
    assert torch.equal(results[2], results[3])
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=2e-4)


def test_results_in_the_dtype_of_the_activations():
    """One share is stored as it comes, several are added first; both are rounded once."""
    subject, x = layer("int4", 8, 4096, 32), activations(1, 4096, torch.float16)
    for splits in (1, 4):
        expected = subject.product(x, GEMV, splits=splits)
        assert torch.equal(subject.product(x, GEMV, splits=splits, dtype=torch.float16), expected.half())


# --- the entry ---


def test_the_entry_is_the_reference_and_keeps_what_it_prepared():
    subject, x = layer("int4", bias=True, rank=2), activations(6, 256, torch.float16).view(2, 3, 256)
    codes = pack(subject.codes, 4)
    arguments = (codes, subject.scales, subject.zeros, subject.table, 4)
    y = matmul.linear(x, *arguments, subject.offset, subject.bias, subject.low_rank)
    expected = quantized_linear(x, *arguments, subject.bias, subject.low_rank)
    assert y.shape == (2, 3, 24)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, expected, rtol=2e-3, atol=0.1)
    entries = matmul._kept._entries
    (kept,) = [kept for kept in entries.values() if kept.codes() is codes]
    matmul.linear(x, *arguments, subject.offset, subject.bias, subject.low_rank)
    assert entries[id(codes)] is kept
    # Other scales, the same codes: the order is kept, the rest is not.
    doubled = matmul.linear(x, codes, subject.scales * 2, *arguments[2:], subject.offset)
    expected = quantized_linear(x, codes, subject.scales * 2, *arguments[2:])
    torch.testing.assert_close(doubled, expected, rtol=2e-3, atol=0.1)
    assert entries[id(codes)].made.words is kept.made.words
    codes += 1  # changed in place: prepared anew
    changed = matmul.linear(x, *arguments, subject.offset, subject.bias, subject.low_rank)
    assert not torch.equal(changed, y)
    key = id(codes)
    del codes, arguments
    assert key not in entries


def test_strided_and_empty_activations():
    subject, wide = layer("int4"), activations(4, 512, torch.float16)
    x = wide[:, 128:384]
    assert torch.equal(subject.product(x, GEMV), subject.product(x.contiguous(), GEMV))
    odd = activations(2, 257, torch.float16)[:, 1:]
    assert torch.equal(subject.product(odd, GEMM), subject.product(odd.contiguous(), GEMM))
    assert subject.product(x[:0], None).shape == (0, 24)


def test_what_can_not_be_multiplied_is_refused():
    subject = layer("int4")
    with pytest.raises(ValueError, match="float32: the GPU kernels multiply"):
        subject.product(torch.zeros(1, 256), None)
    with pytest.raises(ValueError, match="255 features meet a weight of 256"):
        subject.product(torch.zeros(1, 255, dtype=torch.float16), None)
    with pytest.raises(ValueError, match="groups of 8"):
        layer("int3", 4, 64, 8).product(activations(1, 64, torch.float16), None)


# --- 8 x 8 bits ---


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "e4m3"])
@pytest.mark.parametrize(("rows", "columns", "outputs"), [(1, 128, 40), (70, 200, 24), (33, 256, 65)])
def test_eight_bits_by_eight(rows, columns, outputs, dtype):
    x, w = activations(rows, columns, torch.float32), activations(outputs, columns, torch.float32, 2)
    codes, scales = quantize_rows(x, dtype)
    weight, weight_scales = quantize_rows(w, dtype)
    bias = activations(1, outputs, torch.float32, 3)[0]
    config = W8A8Config(64, 32, 128, 1, 1)
    y = w8a8.product_w8a8(codes, scales, weight, weight_scales, bias, torch.float32, config=config)
    left, right = codes.double() * scales[:, None].double(), weight.double() * weight_scales[:, None].double()
    exact = left @ right.T + bias.double(), left.abs() @ right.abs().T + bias.double().abs()
    assert_near(y, exact, 2.0**-21)
    assert_near(w8a8.linear_w8a8(x, weight, weight_scales, bias, config=config), exact, 2.0**-21)


@pytest.mark.parametrize("form", ["int8", "e4m3"])
def test_a_stored_weight_is_the_one_that_is_multiplied(form):
    dtype = torch.int8 if form == "int8" else torch.float8_e4m3fn
    table, x = grid(form).values, activations(5, 128, torch.float32)
    indices = torch.randint(0, len(table), (24, 128), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    codes, scales = pack(indices, grid(form).bits), torch.rand(24, 1) + 0.5
    weight = w8a8.weight_w8a8(codes, scales, table, grid(form).bits, 128, dtype)
    assert w8a8.weight_w8a8(codes, scales, table, grid(form).bits, 128, dtype) is weight
    values, steps = quantize_rows(x, dtype)
    y = w8a8.product_w8a8(values, steps, *weight, config=W8A8Config(64, 32, 128, 1, 1))
    left, right = values.double() * steps[:, None].double(), table[indices.int()].double() * scales.double()
    assert_near(y, (left @ right.T, left.abs() @ right.abs().T), 2.0**-21)


def test_rows_are_quantized_to_nearest():
    x = torch.tensor([[1.0, -127.0, 0.49, 0.51, 63.5], [0.0] * 5])
    codes, scales = quantize_rows(x, torch.int8)
    assert scales.tolist() == [1.0, 0.0]
    assert codes.tolist() == [[1, -127, 0, 1, 64], [0] * 5]


def test_kinds_that_do_not_fit_are_refused():
    eight = torch.zeros(2, 128, dtype=torch.int8)
    with pytest.raises(ValueError, match="both must be"):
        w8a8.product_w8a8(eight, torch.ones(2), eight.to(torch.float8_e4m3fn), torch.ones(2), None, torch.float32)
