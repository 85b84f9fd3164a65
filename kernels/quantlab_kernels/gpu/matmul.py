"""The entry: a product of 16-bit activations and a quantized weight, by the kernel that suits the number of rows."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
import triton

from quantlab_kernels.gpu.configs import Config, GemmConfig, GemvConfig, device_of, shares
from quantlab_kernels.gpu.gemm import gemm, gemm_constants
from quantlab_kernels.gpu.gemv import gemv, gemv_constants, reduce
from quantlab_kernels.gpu.tune import best, tune
from quantlab_kernels.gpu.weight import DTYPES, GpuWeight, prepare

MAGIC = 0x4B000000  # 2^23 as a float32
REDUCE_ROWS = 256
_REDUCE_FACTOR = 8192  # numbers of the low-rank term's factor that a program of four warps holds
_INTERPRETED = bool(triton.knobs.runtime.interpret)


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    table: torch.Tensor,
    bits: int,
    offset: int | None = None,
    bias: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """``x @ W.T + bias`` on the device of ``x``, with ``W = (table[code] - zero) * scale``.

    The codes are re-ordered at the first call and kept for as long as ``codes`` lives, beside them. Who has no use for
    the stored order calls :func:`~quantlab_kernels.gpu.weight.prepare` at load, lets go of ``codes``, and calls
    :func:`product`: then there is one copy.

    Args:
        x: float16 or bfloat16 ``[..., in]``.
        codes: uint8 ``[out, packed_width(in, bits)]``, see :mod:`quantlab_kernels.packing`.
        scales: ``[out, groups]``, ``[out, 1]`` or ``[1, 1]``.
        zeros: like ``scales``, in units of the table, or None.
        table: float32 ``[<= 2**bits]``.
        bits: width of a code, 2 to 8.
        offset: the table is ``code + offset``; None: it is no such thing.
        bias: ``[out]`` or None.
        low_rank: ``(left [out, rank], right [rank, in])``: adds ``x @ right.T @ left.T``.

    Returns:
        ``[..., out]`` in the dtype of ``x``.

    Raises:
        ValueError: the kernels have no layout for this weight, or ``x`` is not of 16 bits.
    """
    given = (scales, zeros, table, bias, *(low_rank or ()))
    version = 0 if codes.is_inference() else codes._version
    kept = _kept.get(id(codes))
    if kept is None or kept.codes() is not codes or kept.version != version:
        words = None
    elif len(kept.given) == len(given) and all(a is b for a, b in zip(kept.given, given, strict=True)):
        return product(x, kept.weight)
    else:
        words = kept.weight.words
    weight = prepare(codes, scales, zeros, table, bits, offset, x.shape[-1], bias, low_rank, words=words)
    key = id(codes)
    _kept[key] = _Kept(weakref.ref(codes, lambda _: _kept.pop(key, None)), version, given, weight)
    return product(x, weight)


class _Kept(NamedTuple):
    """A weight that was prepared, and of what: the codes in which version, and the other tensors."""

    codes: weakref.ref[torch.Tensor]
    version: int
    given: tuple[torch.Tensor | None, ...]
    weight: GpuWeight


_kept: dict[int, _Kept] = {}


def product(
    x: torch.Tensor,
    weight: GpuWeight,
    *,
    config: Config | None = None,
    splits: int | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``x @ W.T + bias`` with a prepared weight.

    Args:
        x: float16 or bfloat16 ``[..., in]``.
        weight: on the same device.
        config: a tile; by default what :func:`quantlab_kernels.gpu.tune.best` says.
        splits: shares of the inputs, added in their order; by default chosen with the config.
        dtype: of the result; by default that of ``x``.

    Raises:
        ValueError: ``x`` is not of 16 bits or not as wide as the weight.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"activations are {x.dtype}: the GPU kernels multiply float16 and bfloat16")
    if x.shape[-1] != weight.columns:
        raise ValueError(f"activations of {x.shape[-1]} features meet a weight of {weight.columns}")
    rows = x.reshape(-1, weight.columns)
    if rows.stride(-1) != 1 or rows.data_ptr() % 16 or rows.stride(0) % 8:
        rows = rows.contiguous()
    y = torch.empty(len(rows), weight.out_features, dtype=dtype or x.dtype, device=x.device)
    if len(rows):
        device, layout = device_of(x.device), weight.kind.layout
        if config is None:
            config, splits = best(device, weight.kind.format, layout, weight.out_features, len(rows))
        splits = splits or shares(device, config, layout, weight.out_features, len(rows))
        with torch.cuda.device_of(rows):  # Triton launches on the current device
            if isinstance(config, GemvConfig):
                _gemv(rows, weight, y, config, splits)
            else:
                _gemm(rows, weight, y, config, splits)
    return y.view(*x.shape[:-1], weight.out_features)


def tune_product(x: torch.Tensor, weight: GpuWeight) -> tuple[Config, int]:
    """Time the configs for activations like ``x`` and use the fastest from now on: ``quantlab_kernels.gpu.tune``."""
    rows = x.reshape(-1, weight.columns)

    def run(config: Config, splits: int) -> torch.Tensor:
        return product(rows, weight, config=config, splits=splits)

    return tune(rows, weight, run, device_of(x.device))


def _share(weight: GpuWeight, block_lanes: int, splits: int) -> tuple[int, int, bool]:
    """Lanes of a share, how many shares there are, and whether all tiles are full."""
    layout = weight.kind.layout
    steps = triton.cdiv(layout.lanes, block_lanes)
    each = triton.cdiv(steps, splits)
    full = layout.lanes % block_lanes == 0 and weight.columns * layout.unit_lanes == layout.lanes * layout.unit
    return each * block_lanes, triton.cdiv(steps, each), full


def _gemv(x: torch.Tensor, weight: GpuWeight, y: torch.Tensor, config: GemvConfig, splits: int) -> None:
    device = device_of(x.device)
    chunk, splits, full = _share(weight, config.block_lanes, splits)
    asm = device.architecture.startswith("sm_")
    reading, table = weight.reading(x.dtype, dense=False, registers=asm)
    left, right = weight.factors(x.dtype) if weight.rank else (x, x)
    rows, outputs = len(x), weight.out_features + weight.rank
    blocks = triton.cdiv(weight.out_features, config.block_rows)
    whole = splits == 1 and not weight.rank and weight.bias is None
    partial = y[None] if whole else torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    gemv[(blocks + triton.cdiv(weight.rank, config.block_rows), splits)](
        x, weight.words, weight.scales, weight.words if weight.zeros is None else weight.zeros, table, right, partial,
        weight.columns, weight.out_features, weight.kind.layout.lanes // 4, weight.scales.shape[1],
        x.stride(0), chunk // 4, right.stride(0), blocks, outputs, MAGIC, reading.factor, reading.fold,
        **gemv_constants(weight.kind, x.dtype == torch.float16, weight.rank, rows, config, full, asm),
        **config.options, enable_fp_fusion=True,
    )  # fmt: skip
    if not whole:
        _reduce(partial, weight, y, partial[:, :, weight.out_features :], left)


def _gemm(x: torch.Tensor, weight: GpuWeight, y: torch.Tensor, config: GemmConfig, splits: int) -> None:
    device = device_of(x.device)
    chunk, splits, full = _share(weight, config.lanes(weight.kind.format.bits), splits)
    asm = device.architecture.startswith("sm_")
    reading, table = weight.reading(x.dtype, dense=True, registers=asm)
    whole = splits == 1 and not weight.rank
    sums = y if whole else torch.empty(splits, *y.shape, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(weight.out_features, config.block_n), triton.cdiv(len(x), config.block_m), splits)
    gemm[grid](
        x, weight.words, weight.scales, weight.words if weight.zeros is None else weight.zeros, table, weight.powers,
        weight.powers if weight.bias is None else weight.bias, sums,
        len(x), weight.columns, weight.out_features, weight.kind.layout.lanes // 4, weight.scales.shape[1],
        x.stride(0), sums.stride(-2), 0 if whole else sums.stride(0), chunk // 4, MAGIC,
        reading.factor,
        **gemm_constants(weight.kind, config, full, whole and weight.bias is not None, asm, _INTERPRETED),
        num_warps=config.warps, num_stages=config.depth(weight.kind.format.bits), enable_fp_fusion=True,
    )  # fmt: skip
    if not whole:
        left, right = weight.factors(x.dtype) if weight.rank else (x, x)
        hidden = (x @ right.T).float()[None] if weight.rank else sums
        _reduce(sums, weight, y, hidden, left)


def _reduce(
    partial: torch.Tensor, weight: GpuWeight, y: torch.Tensor, hidden: torch.Tensor, left: torch.Tensor
) -> None:
    rank, rank_block = weight.rank, triton.next_power_of_2(max(weight.rank, 1))
    block = max(16, min(REDUCE_ROWS, _REDUCE_FACTOR // rank_block))
    reduce[(triton.cdiv(weight.out_features, block), len(y))](
        partial, hidden, weight.powers if weight.bias is None else weight.bias, left, y,
        weight.out_features, partial.stride(-2), hidden.stride(-2), len(y), y.stride(0), left.stride(0),
        SPLITS=len(partial), HIDDEN_SPLITS=len(hidden), BIAS=weight.bias is not None,
        RANK=rank, RANK_BLOCK=rank_block, BN=block,
        num_warps=4,
    )  # fmt: skip
