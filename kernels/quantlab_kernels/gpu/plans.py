"""How a product with one weight is carried out: which kernels, in which pieces. Made once a form of activations.

A plan is called with activations ``[rows, in]`` and the result ``[rows, out]``. It holds all that does not depend on
their values, so that a call is little more than its launches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

from quantlab_kernels.gpu.configs import (
    Config,
    GemmConfig,
    GemvConfig,
    PanelConfig,
    device_of,
    gemm_config,
    shares,
    table_for,
)
from quantlab_kernels.gpu.gemm import gemm, gemm_constants
from quantlab_kernels.gpu.gemv import gemv, gemv_constants, reduce
from quantlab_kernels.gpu.launch import Launch
from quantlab_kernels.gpu.panels import PANEL_BYTES, dequantize, panel_constants
from quantlab_kernels.gpu.tune import best
from quantlab_kernels.gpu.weight import GpuWeight

MAGIC = 0x4B000000  # 2^23 as a float32
REDUCE_ROWS = 256
_REDUCE_FACTOR = 8192  # numbers of the low-rank term's factor that a program of four warps holds
_WHOLE_TILE = 4  # warps that multiply a tile together
_WIDE_ROWS = 64  # whose tile is one of those
# Triton 3.6 multiplies wrongly on one or two warps where codes have zeros, seen on an H100; 3.9 is right.
_ZEROS_SOUND = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)
_INTERPRETED = bool(triton.knobs.runtime.interpret)

Plan = Callable[[torch.Tensor, torch.Tensor], None]


def plan_for(
    weight: GpuWeight,
    rows: int,
    stride: int,
    dtype: torch.dtype,
    result: torch.dtype,
    config: Config | None = None,
    splits: int | None = None,
) -> Plan:
    """The plan for ``rows`` rows of ``dtype``, ``stride`` apart, and a result of dtype ``result``.

    Args:
        config: a tile; by default what :func:`quantlab_kernels.gpu.tune.best` says.
        splits: shares of the inputs, added in their order; by default chosen with the config.
    """
    device, layout, format = device_of(weight.words.device), weight.kind.layout, weight.kind.format
    if config is None:
        config, splits = best(device, format, layout, weight.out_features, rows)
    if weight.zeros is not None and isinstance(config, GemmConfig) and config.warps < _WHOLE_TILE and not _ZEROS_SOUND:
        config, splits = table_for(device.architecture).panel, None
    if isinstance(config, PanelConfig):
        if result == dtype and weight.fits(dtype):
            return _panels(weight, dtype, config)
        config, splits = gemm_config(device.architecture, format, max(rows, _WIDE_ROWS)), None
    splits = splits or shares(device, config, layout, weight.out_features, rows)
    if isinstance(config, GemvConfig):
        return _gemv(weight, rows, stride, dtype, config, splits)
    return _gemm(weight, rows, stride, dtype, config, splits)


def _share(weight: GpuWeight, block_lanes: int, splits: int) -> tuple[int, int, bool]:
    """Lanes of a share, how many shares there are, and whether all tiles are full."""
    layout = weight.kind.layout
    steps = triton.cdiv(layout.lanes, block_lanes)
    each = triton.cdiv(steps, splits)
    full = layout.lanes % block_lanes == 0 and weight.columns * layout.unit_lanes == layout.lanes * layout.unit
    return each * block_lanes, triton.cdiv(steps, each), full


def _asm(weight: GpuWeight) -> bool:
    return device_of(weight.words.device).architecture.startswith("sm_")


def _gemv(weight: GpuWeight, rows: int, stride: int, dtype: torch.dtype, config: GemvConfig, splits: int) -> Plan:
    chunk, splits, full = _share(weight, config.block_lanes, splits)
    asm = _asm(weight)
    reading, table = weight.reading(dtype, dense=False, registers=asm)
    right = weight.factors(dtype)[1] if weight.rank else None
    out_features, outputs = weight.out_features, weight.out_features + weight.rank
    blocks = triton.cdiv(out_features, config.block_rows)
    whole = splits == 1 and not weight.rank and weight.bias is None
    zeros = weight.words if weight.zeros is None else weight.zeros
    launch = Launch(
        gemv,
        (blocks + triton.cdiv(weight.rank, config.block_rows), splits),
        gemv_constants(weight.kind, dtype == torch.float16, weight.rank, rows, config, full, asm),
        config.options,
    )
    quads, groups = weight.kind.layout.lanes // 4, weight.scales.shape[1]
    add = None if whole else _sum(weight, rows, splits, outputs, splits, dtype)

    def plan(x: torch.Tensor, y: torch.Tensor) -> None:
        sums = y if add is None else x.new_empty((splits, rows, outputs), dtype=torch.float32)
        launch(
            x, weight.words, weight.scales, zeros, table, x if right is None else right, sums,
            weight.columns, out_features, quads, groups, stride, chunk // 4, weight.columns, blocks, outputs, MAGIC,
            reading.factor, reading.fold,
        )  # fmt: skip
        if add is not None:
            add(sums, sums[:, :, out_features:], y)

    return plan


def _gemm(weight: GpuWeight, rows: int, stride: int, dtype: torch.dtype, config: GemmConfig, splits: int) -> Plan:
    bits, out_features = weight.kind.format.bits, weight.out_features
    chunk, splits, full = _share(weight, config.lanes(bits), splits)
    asm = _asm(weight)
    reading, table = weight.reading(dtype, dense=True, registers=asm)
    right = weight.factors(dtype)[1] if weight.rank else None
    whole = splits == 1 and not weight.rank
    zeros = weight.words if weight.zeros is None else weight.zeros
    bias = weight.powers if weight.bias is None else weight.bias
    launch = Launch(
        gemm,
        (triton.cdiv(out_features, config.block_n), triton.cdiv(rows, config.block_m), splits),
        gemm_constants(weight.kind, config, full, whole and weight.bias is not None, asm, _INTERPRETED),
        {"num_warps": config.warps, "num_stages": config.depth(bits)},
    )
    quads, groups = weight.kind.layout.lanes // 4, weight.scales.shape[1]
    hidden_splits = 1 if weight.rank else splits
    add = None if whole else _sum(weight, rows, splits, out_features, hidden_splits, dtype)

    def plan(x: torch.Tensor, y: torch.Tensor) -> None:
        sums = y if add is None else x.new_empty((splits, rows, out_features), dtype=torch.float32)
        launch(
            x, weight.words, weight.scales, zeros, table, weight.powers, bias, sums,
            rows, weight.columns, out_features, quads, groups, stride, out_features,
            0 if whole else rows * out_features, chunk // 4, MAGIC, reading.factor,
        )  # fmt: skip
        if add is not None:
            add(sums, sums if right is None else (x @ right.T).float()[None], y)

    return plan


def _sum(
    weight: GpuWeight, rows: int, splits: int, outputs: int, hidden_splits: int, dtype: torch.dtype
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """A call that adds shares ``[splits, rows, outputs]``, the low-rank term and the bias into the result."""
    out_features, rank = weight.out_features, weight.rank
    rank_block = triton.next_power_of_2(max(rank, 1))
    block = max(16, min(REDUCE_ROWS, _REDUCE_FACTOR // rank_block))
    bias = weight.powers if weight.bias is None else weight.bias
    left = weight.factors(dtype)[0] if rank else None
    constants = {
        "SPLITS": splits,
        "HIDDEN_SPLITS": hidden_splits,
        "BIAS": weight.bias is not None,
        "RANK": rank,
        "RANK_BLOCK": rank_block,
        "BN": block,
    }
    launch = Launch(reduce, (triton.cdiv(out_features, block), rows), constants, {"num_warps": 4})

    def add(sums: torch.Tensor, hidden: torch.Tensor, y: torch.Tensor) -> None:
        launch(
            sums, hidden, bias, y if left is None else left, y, out_features, outputs, hidden.stride(-2), rows,
            out_features, rank,
        )  # fmt: skip

    return add


def _panels(weight: GpuWeight, dtype: torch.dtype, config: PanelConfig) -> Plan:
    asm = _asm(weight)
    reading, table = weight.reading(dtype, dense=True, registers=asm)
    layout, out_features, columns = weight.kind.layout, weight.out_features, weight.columns
    count = triton.cdiv(2 * columns * out_features, PANEL_BYTES)
    height = triton.cdiv(triton.cdiv(out_features, count), config.block_rows) * config.block_rows
    zeros = weight.words if weight.zeros is None else weight.zeros
    launch = Launch(
        dequantize,
        (triton.cdiv(height, config.block_rows), triton.cdiv(layout.lanes, config.block_lanes)),
        panel_constants(weight.kind, config, asm),
        {"num_warps": config.warps},
    )
    quads, groups = layout.lanes // 4, weight.scales.shape[1]
    bias = None if weight.bias is None else weight.bias.to(dtype)

    def plan(x: torch.Tensor, y: torch.Tensor) -> None:
        panel = x.new_empty((height, columns))
        for first in range(0, out_features, height):
            launch(
                weight.words, weight.scales, zeros, table, weight.powers, panel,
                columns, out_features, quads, groups, first, MAGIC, reading.factor,
            )  # fmt: skip
            into = y[:, first : first + height]
            if bias is None:
                torch.mm(x, panel[: into.shape[1]].T, out=into)
            else:
                torch.addmm(bias[first : first + height], x, panel[: into.shape[1]].T, out=into)
        if weight.rank:
            left, right = weight.factors(dtype)
            y.addmm_(x @ right.T, left.T)

    return plan
