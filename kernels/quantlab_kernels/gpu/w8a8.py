"""8-bit activations with one scale a row, 8-bit weights with one scale a row: int8 x int8 and e4m3 x e4m3."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from quantlab_kernels.activations import ACTIVATIONS, quantize_rows, values_of_codes
from quantlab_kernels.gpu.configs import W8A8Config, choose_w8a8, device_of
from quantlab_kernels.kept import Kept


@triton.jit
def gemm_w8a8(
    x_ptr, w_ptr, x_scales_ptr, w_scales_ptr, bias_ptr, y_ptr,
    rows, columns, out_features, x_stride, w_stride, y_stride,
    INTEGER: tl.constexpr, FULL: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """``y = (x @ w.T) * x_scales * w_scales + bias``.

    Args:
        x_ptr: int8 or e4m3 ``[rows, columns]``, rows ``x_stride`` apart.
        w_ptr: the same dtype, ``[out_features, columns]``, rows ``w_stride`` apart.
        x_scales_ptr: float32 ``[rows]``; w_scales_ptr: ``[out_features]``.
        INTEGER: add in int32, exactly. Otherwise in float32; tensor cores that add 8-bit products with fewer bits
            hand their sums over every 128 inputs.
        TOGETHER: blocks of rows that run next to each other along the outputs, so that they share what is in the cache.
    """
    across, down = tl.cdiv(out_features, BN), tl.cdiv(rows, BM)
    first = tl.program_id(0) // (TOGETHER * across) * TOGETHER
    height = tl.minimum(down - first, TOGETHER)
    within = tl.program_id(0) % (TOGETHER * across)
    m = (first + within % height) * BM + tl.arange(0, BM)
    n = within // height * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x = x_ptr + tl.minimum(m, rows - 1).to(tl.int64)[:, None] * x_stride + k[None, :]
    w = w_ptr + tl.minimum(n, out_features - 1).to(tl.int64)[:, None] * w_stride + k[None, :]
    # Transposed, so that the wide side of a tensor core's tile is filled even where there are few rows.
    sums = tl.zeros([BN, BM], tl.int32 if INTEGER else tl.float32)
    for start in range(0, columns, BK):
        if FULL:
            left, right = tl.load(w + start), tl.load(x + start)
        else:
            live = (k < columns - start)[None, :]
            left, right = tl.load(w + start, mask=live, other=0.0), tl.load(x + start, mask=live, other=0.0)
        if INTEGER:
            sums = tl.dot(left, tl.trans(right), sums, out_dtype=tl.int32)
        else:
            sums = tl.dot(left, tl.trans(right), sums, max_num_imprecise_acc=128)
    y = sums.to(tl.float32) * tl.load(x_scales_ptr + m, mask=m < rows, other=0.0)[None, :]
    y *= tl.load(w_scales_ptr + n, mask=n < out_features, other=0.0)[:, None]
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < out_features, other=0.0).to(tl.float32)[:, None]
    at = m.to(tl.int64)[None, :] * y_stride + n[:, None]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(n < out_features)[:, None] & (m < rows)[None, :])


def linear_w8a8(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    config: W8A8Config | None = None,
) -> torch.Tensor:
    """``x @ W.T + bias`` with ``x`` quantized as it comes, a scale a row, and ``W = weight * weight_scales``.

    Args:
        x: float16, bfloat16 or float32 ``[..., in]``.
        weight: int8 or float8_e4m3fn ``[out, in]``.
        weight_scales: ``[out]``.
        bias: ``[out]`` or None.
        config: a tile; by default chosen by the rows.

    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    codes, scales = quantize_rows(x.reshape(-1, x.shape[-1]), weight.dtype)
    y = product_w8a8(codes, scales, weight, weight_scales, bias, x.dtype, config=config)
    return y.view(*x.shape[:-1], -1)


class Weight8(NamedTuple):
    """A weight as :func:`product_w8a8` takes it: int8 or float8_e4m3fn ``[out, in]``, and float32 scales ``[out]``."""

    values: torch.Tensor
    scales: torch.Tensor


def weight_w8a8(
    codes: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, bits: int, columns: int, dtype: torch.dtype
) -> Weight8:
    """The weight of packed codes, kept beside them for as long as they live.

    Args:
        codes: uint8 ``[out, packed_width(in, bits)]``, see :mod:`quantlab_kernels.packing`.
        scales: ``[out, 1]`` or ``[1, 1]``.
        table: of values that ``dtype`` holds exactly.
        bits: width of a code.
        columns: inputs.
        dtype: int8 or float8_e4m3fn.
    """

    def make(_: Weight8 | None) -> Weight8:
        values = values_of_codes(codes, table, bits, columns, dtype)
        return Weight8(values, scales.float().flatten().expand(len(codes)).contiguous())

    return _kept.of(codes, (scales, table), make)


_kept: Kept[Weight8] = Kept()


def product_w8a8(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    config: W8A8Config | None = None,
) -> torch.Tensor:
    """The product of 8-bit rows ``[rows, in]`` and an 8-bit weight ``[out, in]``, with a scale for each row.

    Raises:
        ValueError: the two are not both int8 or both float8_e4m3fn, or the device has no tensor cores for e4m3.
    """
    if codes.dtype != weight.dtype or codes.dtype not in ACTIVATIONS.values():
        raise ValueError(f"{codes.dtype} meets {weight.dtype}: both must be int8, or both float8_e4m3fn")
    device = device_of(codes.device)
    if not multiplies(codes.dtype, codes.device):
        raise ValueError(f"{device.architecture} does not multiply float8_e4m3fn; use int8")
    config = config or choose_w8a8(device, len(codes))
    codes, weight = codes.contiguous(), weight.contiguous()
    rows, columns = codes.shape
    y = torch.empty(rows, len(weight), dtype=dtype, device=codes.device)
    if rows:
        grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(len(weight), config.block_n),)
        gemm_w8a8[grid](
            codes, weight, scales.float(), weight_scales.float(), scales if bias is None else bias, y,
            rows, columns, len(weight), codes.stride(0), weight.stride(0), y.stride(0),
            **w8a8_constants(config, codes.dtype == torch.int8, columns % config.block_k == 0, bias is not None),
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def w8a8_constants(config: W8A8Config, integer: bool, full: bool, bias: bool) -> dict[str, Any]:
    """The ``tl.constexpr`` arguments of :func:`gemm_w8a8`."""
    return {
        "INTEGER": integer,
        "FULL": full,
        "BIAS": bias,
        "BM": config.block_m,
        "BN": config.block_n,
        "BK": config.block_k,
        "TOGETHER": 8,
    }


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device's tensor cores take such 8-bit numbers."""
    return dtype == torch.int8 or multiplies_e4m3(device_of(device).architecture)


def multiplies_e4m3(architecture: str) -> bool:
    """Whether a device's tensor cores take e4m3 as OCP defines it: NVIDIA's from sm_89 on. (gfx942's is another.)"""
    return not architecture.startswith("gfx") and (not architecture.startswith("sm_") or int(architecture[3:]) >= 89)
