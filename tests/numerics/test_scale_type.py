from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.errors import RecipeError
from quantlab.numerics import (
    Grid,
    QTensor,
    Scales,
    apply_scales,
    choose_scales,
    decode_scales,
    grid,
    group_view,
    scale_type,
)
from quantlab.numerics.search import symmetric_scales

bitsandbytes = pytest.importorskip("bitsandbytes.functional")

NAMES = ["float32", "float16", "bfloat16", "e8m0", "e4m3", "int8", "dynamic8"]
each_type = pytest.mark.parametrize("name", NAMES)


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def rounded(weight: torch.Tensor, name: str, granularity: int | str, **how) -> QTensor:
    table = grid(name)
    scales = choose_scales(weight, table, granularity, **how)
    return QTensor.of(apply_scales(weight, table, scales), scales, table)


def errors(weight: torch.Tensor, q: QTensor, granularity: int | str) -> torch.Tensor:
    return group_view((weight.double() - q.dequantize().double()).square(), granularity).sum(-1)


# --- every type ---


@each_type
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-10, 1e-4, 1.0, 1e4, 1e10, 1e30])
def test_scales_are_never_zero_infinite_or_negative_without_reason(name, size):
    kind = scale_type(name)
    scales = gaussian(20, 40).exp() * size
    scales[3], scales[0, 0] = 0, 0
    if kind.signed:
        scales *= gaussian(20, 40, 1).sign()
    outer = kind.outer(scales)
    stored = kind.encode(scales, outer)
    assert stored.dtype == kind.dtype
    decoded = decode_scales(stored, outer)
    assert decoded.isfinite().all()
    assert torch.all(decoded != 0)
    assert kind.signed or torch.all(decoded > 0)
    if kind.signed and name != "float16" and size > 1e-38:
        assert torch.equal(decoded.sign()[scales != 0], scales.sign()[scales != 0])


@each_type
def test_what_was_stored_is_stored_as_it_is(name):
    kind = scale_type(name)
    scales = gaussian(16, 48).exp()
    outer = kind.outer(scales)
    stored = kind.encode(scales, outer)
    again = kind.encode(decode_scales(stored, outer), outer)
    assert torch.equal(again.view(torch.uint8), stored.view(torch.uint8))


@each_type
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("table", ["int4", "nf4", "e2m1"])
def test_weights_survive_every_type(name, symmetric, search, table):
    weight = gaussian(32, 128) * 0.05
    weight[:, 32:64] = 0
    weight[5] = 0
    q = rounded(weight, table, 32, stored=name, symmetric=symmetric, search=search)
    assert torch.count_nonzero(q.dequantize()[:, 32:64]) == torch.count_nonzero(q.dequantize()[5]) == 0
    left = float((q.dequantize() - weight).square().sum() / weight.square().sum())
    assert left < {"e8m0": 0.045}.get(name, 0.025)


@each_type
def test_nothing_but_zeros(name):
    q = rounded(torch.zeros(4, 64), "int4", 32, stored=name)
    assert torch.count_nonzero(q.dequantize()) == 0


@pytest.mark.parametrize("symmetric", [True, False])
@each_type
def test_zeros_stay_small_where_a_table_has_none(name, symmetric):
    table = Grid("no-zero", 2, torch.tensor([-1.0, -0.3, 0.3, 1.0]))
    weight = torch.cat([torch.zeros(8, 32), gaussian(8, 32)], dim=1)
    scales = choose_scales(weight, table, 32, stored=name, symmetric=symmetric)
    q = QTensor.of(apply_scales(weight, table, scales), scales, table)
    # Codes of 8 bits under a second level do not reach further down than a 127th of the largest.
    assert float(q.dequantize()[:, :32].abs().max()) <= {"int8": 1e-2, "dynamic8": 1e-1, "e4m3": 1e-4}.get(name, 1e-4)


def test_an_unknown_type_is_refused():
    with pytest.raises(RecipeError, match=r"scale_dtype 'fp8': use one of float32, .*dynamic8"):
        scale_type("fp8")


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 700), st.integers(0, 10**6))
def test_int8_errs_by_half_a_step_of_the_largest_of_its_block(count, seed):
    kind = scale_type("int8")
    scales = gaussian(1, count, seed).exp()
    outer = kind.outer(scales)
    assert len(outer.scales) == -(-count // 256)
    off = (decode_scales(kind.encode(scales, outer), outer) - scales).abs().flatten()
    for block in range(len(outer.scales)):
        part = slice(256 * block, 256 * block + 256)
        step = scales.flatten()[part].max() / 127
        # Half a step, but for what would be 0 and becomes the smallest.
        allowed = torch.maximum(step / 2, step - scales.flatten()[part])
        assert torch.all(off[part] <= allowed * (1 + 1e-4))


def test_bits_count_every_level():
    weight = gaussian(64, 512)
    count = 64 * 512 // 64  # scales
    codes, table = 64 * 512 * 4, 16 * 32
    extra = {"float32": 0, "float16": 0, "bfloat16": 0, "e8m0": 0, "e4m3": 32, "int8": 2 * 32, "dynamic8": 2 * 32 + 32}
    width = {"float32": 32, "float16": 16, "bfloat16": 16}
    for name in NAMES:
        q = rounded(weight, "nf4", 64, stored=name)
        expected = codes + table + count * width.get(name, 8) + extra[name]
        assert q.stored_bits() == expected
        assert q.bits_per_weight() == expected / weight.numel()


# --- bitsandbytes ---


def test_the_dynamic_map_is_bitsandbytes():
    from quantlab.numerics.scale_type import dynamic_map

    assert torch.equal(dynamic_map(), bitsandbytes.create_dynamic_map())


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_four_bits_are_bitsandbytes(name):
    """The same scales and the same codes, but where two codes are equally near to float32's precision."""
    weight = gaussian(256, 1024) * 0.03
    codes, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type=name)
    theirs = bitsandbytes.dequantize_4bit(codes, state)
    q = rounded(weight, name, 64, search=False)
    assert torch.equal(q.scales.flatten(), state.absmax)
    ours = q.dequantize()
    differ = ours != theirs
    assert int(differ.sum()) <= 2, "they multiply by the reciprocal of the scale, which can differ in the last bit"
    torch.testing.assert_close((ours - weight).abs()[differ], (theirs - weight).abs()[differ], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_four_bits_tie_like_bitsandbytes(name):
    """Under a scale of 1: every entry, everything halfway, and the floats beside it."""
    values = grid(name).values
    half = (values[1:] + values[:-1]) / 2
    beside = [torch.nextafter(half, torch.full_like(half, end)) for end in (-torch.inf, torch.inf)]
    probes = torch.cat([values, half, *beside])
    weight = torch.cat([torch.nn.functional.pad(part, (1, 63 - len(part)), value=1.0) for part in probes.split(63)])
    weight = weight.view(-1, 64)
    codes, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type=name)
    assert torch.equal(rounded(weight, name, 64, search=False).dequantize(), bitsandbytes.dequantize_4bit(codes, state))


def nested(weight: torch.Tensor) -> tuple[Scales, bitsandbytes.QuantState]:
    _, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    return choose_scales(weight, grid("nf4"), 64, search=False, stored="dynamic8"), state


def test_scales_of_scales_are_bitsandbytes():
    """The second level is the same, and what their codes mean is the same bit for bit."""
    scales, state = nested(gaussian(96, 1024) * 0.03)
    assert torch.equal(scales.outer.scales, state.state2.absmax)
    assert torch.equal(scales.outer.offset, state.offset.view(1))
    for codes in (scales.scales.flatten(), state.absmax.flatten(), torch.arange(256, dtype=torch.uint8).repeat(6)):
        theirs = bitsandbytes.dequantize_blockwise(codes, state.state2) + state.offset
        assert torch.equal(decode_scales(codes.view(96, 16), scales.outer).flatten(), theirs)


def test_codes_of_scales_are_the_nearest():
    """bitsandbytes takes a coarse look-up on a CPU, which now and then misses the nearest; it never does better."""
    weight = gaussian(96, 1024) * 0.03
    scales, state = nested(weight)
    exact = choose_scales(weight, grid("nf4"), 64, search=False).scales.flatten()
    inner = scales.outer.scales.repeat_interleave(256)
    far = ((exact - state.offset) * (1 / inner))[:, None] - bitsandbytes.create_dynamic_map()
    assert torch.equal(scales.scales.flatten(), far.abs().argmin(1).to(torch.uint8))
    off = (scales.decode().flatten() - exact).abs()
    coarse = (bitsandbytes.dequantize_blockwise(state.absmax, state.state2) + state.offset - exact).abs()
    assert torch.all(off <= coarse + 1e-7)
    assert torch.count_nonzero(scales.scales.flatten() != state.absmax) < 0.01 * len(off)


# --- Microscaling ---

MX = ["e2m1", "e3m2", "e2m3", "e4m3", "e5m2"]
LARGEST_EXPONENT = {"e2m1": 2, "e3m2": 4, "e2m3": 2, "e4m3": 8, "e5m2": 15}
each_mx = pytest.mark.parametrize("name", MX)


def blocks() -> torch.Tensor:
    """Blocks of 32 of many sizes, some with zeros, with one huge element, with powers of two, subnormal."""
    weight = gaussian(64, 32) * 2.0 ** torch.randint(-40, 40, (64, 1), generator=torch.Generator().manual_seed(2))
    weight[0], weight[1, 1:], weight[2] = 0, 0, 2.0 ** torch.arange(-16, 16)
    weight[3, 5], weight[4], weight[5] = 1e30, 6.0, gaussian(1, 32, 3)[0] * 1e-39
    weight[6], weight[7] = gaussian(1, 32, 4)[0] * 1e37, 2.0**-149
    return weight


@each_mx
def test_mx_scales_are_those_of_the_standard(name):
    """The largest power of two in a block, divided by the largest power of two of the element format."""
    weight = blocks()
    scales = choose_scales(weight, grid(name), 32, search=False, stored="e8m0")
    assert scales.scales.dtype == torch.float8_e8m0fnu
    for row, largest in zip(scales.scales.flatten(), weight.abs().amax(1).tolist(), strict=True):
        expected = 1.0
        if largest > 0:
            expected = 2.0 ** max(-127, np.frexp(largest)[1] - 1 - LARGEST_EXPONENT[name])
        assert float(row.float()) == expected
    bits = scales.scales.view(torch.uint8).numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert scales.decode().tolist() == bits.tolist()


@pytest.mark.parametrize("name", ["e2m1", "e3m2", "e2m3", "e4m3", "e5m2"])
def test_mx_blocks_are_what_ml_dtypes_makes_of_them(name):
    dtypes = {"e2m1": "float4_e2m1fn", "e3m2": "float6_e3m2fn", "e2m3": "float6_e2m3fn"}
    dtype = getattr(ml_dtypes, dtypes.get(name, f"float8_{name}fn".replace("e5m2fn", "e5m2")))
    weight = blocks()
    q = rounded(weight, name, 32, search=False, stored="e8m0")
    scale = q.scales.float()
    elements = (weight / scale).clamp(grid(name).lowest, grid(name).highest).numpy().astype(dtype).astype(np.float32)
    assert torch.equal(q.dequantize(), torch.from_numpy(elements) * scale)


@each_mx
def test_searched_powers_of_two_are_the_best_there_are(name):
    """Against every power of two; never worse than the standard's, nor than its neighbours."""
    weight = gaussian(200, 32, 5).pow(3) * 2.0 ** torch.randint(-8, 8, (200, 1))
    found = errors(weight, rounded(weight, name, 32, stored="e8m0"), 32)
    standard = errors(weight, rounded(weight, name, 32, stored="e8m0", search=False), 32)
    assert torch.all(found <= standard * (1 + 1e-5))
    exponents = torch.frexp(weight.abs().amax(1, keepdim=True)).exponent
    best = torch.full_like(standard, torch.inf)
    for shift in range(-24, 8):
        scale = torch.ldexp(torch.ones(200, 1), exponents + shift)
        off = (grid(name).round(weight / scale) * scale - weight).double().square().sum(1, keepdim=True)
        best = torch.minimum(best, off)
    assert float(found.sum()) <= 1.03 * float(best.sum())
    assert float(found.sum()) < float(standard.sum())


@pytest.mark.parametrize("stored", ["e8m0", "e4m3"])
@pytest.mark.parametrize("table", ["e2m1", "e3m2", "int4"])
def test_the_better_neighbour_is_taken(stored, table):
    weight = gaussian(100, 32, 6)
    kind = scale_type(stored)
    searched = rounded(weight, table, 32, stored=stored)
    found = errors(weight, searched, 32)
    free = symmetric_scales(weight.unsqueeze(1), grid(table), True, None, kind.signed)
    for neighbour in kind.neighbours(free, searched.outer):
        scales = Scales(neighbour, None, searched.outer)
        q = QTensor.of(apply_scales(weight, grid(table), scales), scales, grid(table))
        assert torch.all(found <= errors(weight, q, 32) * (1 + 1e-5))


@pytest.mark.parametrize(("stored", "margin"), [("e8m0", 2.2), ("e4m3", 1.12)])
@pytest.mark.parametrize("table", ["e2m1", "nf4", "int4"])
def test_zeros_follow_coarse_scales(stored, margin, table):
    """Whatever a scale is rounded to, the range stays where the weights are."""
    weight = gaussian(100, 32, 6) + 0.5
    free = errors(weight, rounded(weight, table, 32, symmetric=False), 32)
    found = errors(weight, rounded(weight, table, 32, stored=stored, symmetric=False), 32)
    assert float(found.sum()) <= margin * float(free.sum())
    covering = rounded(weight, table, 32, stored=stored, symmetric=False, search=False)
    step = covering.grid.values.diff().max() * decode_scales(covering.scales, covering.outer)
    assert torch.all((covering.dequantize() - weight).abs() <= 1.1 * step)


# --- NVFP4 ---


def test_nvfp4_scales_are_those_of_its_recipe():
    """Of a block of 16 ``amax / 6``, in E4M3 under ``amax_of_all / (448 * 6)``."""
    weight = gaussian(64, 256) * 0.02
    scales = choose_scales(weight, grid("e2m1"), 16, search=False, stored="e4m3")
    outer = weight.abs().max() / (448 * 6)
    assert scales.outer.offset is None
    torch.testing.assert_close(scales.outer.scales, outer.view(1), rtol=1e-6, atol=0)
    blocks = weight.view(64, 16, 16).abs().amax(-1) / 6 / scales.outer.scales
    expected = blocks.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert scales.scales.float().tolist() == expected.tolist()
    assert float(scales.scales.float().max()) == 448


def test_nvfp4_means_what_compressed_tensors_makes_of_it():
    """Their packing of our entries and their decoder, which divides by the inverse of our second level."""
    weight = gaussian(32, 256) * 0.02
    q = rounded(weight, "e2m1", 16, stored="e4m3")
    entries = q.grid.values[q.codes.long()]
    unpacked = unpack_fp4_from_uint8(pack_fp4_to_uint8(entries), 32, 256, torch.float32)
    assert torch.equal(unpacked, entries)
    arguments = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True)
    theirs = dequantize(unpacked, q.scales.float(), args=arguments, global_scale=1 / q.outer.scales)
    torch.testing.assert_close(q.dequantize(), theirs.float(), rtol=1e-6, atol=0)
