"""The entry: a product of 16-bit activations and a quantized weight, by the kernel that suits the number of rows."""

from __future__ import annotations

import torch

from quantlab_kernels.gpu import tune
from quantlab_kernels.gpu.configs import Config, device_of
from quantlab_kernels.gpu.plans import plan_for
from quantlab_kernels.gpu.weight import DTYPES, GpuWeight, prepare
from quantlab_kernels.kept import Kept


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

    def make(before: GpuWeight | None) -> GpuWeight:
        words = None if before is None else before.words
        return prepare(codes, scales, zeros, table, bits, offset, x.shape[-1], bias, low_rank, words=words)

    return product(x, _kept.of(codes, (scales, zeros, table, bias, *(low_rank or ())), make))


_kept: Kept[GpuWeight] = Kept()


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
    count, stride = rows.shape[0], rows.stride(0)
    y = torch.empty(count, weight.out_features, dtype=dtype or x.dtype, device=x.device)
    if count:
        key = (count, stride, x.dtype, y.dtype, config, splits, tune.version)
        plan = weight.plans.get(key)
        if plan is None:
            plan = plan_for(weight, count, stride, x.dtype, y.dtype, config, splits)
            weight.keep(key, plan)
        with torch.cuda.device_of(rows):  # Triton launches on the current device
            plan(rows, y)
    return y.view(*x.shape[:-1], weight.out_features)


def tune_product(x: torch.Tensor, weight: GpuWeight) -> tuple[Config, int]:
    """Time the configs for activations like ``x`` and use the fastest from now on: ``quantlab_kernels.gpu.tune``."""
    rows = x.reshape(-1, weight.columns)

    def run(config: Config, splits: int) -> torch.Tensor:
        return product(rows, weight, config=config, splits=splits)

    return tune.tune(rows, weight, run, device_of(x.device))
