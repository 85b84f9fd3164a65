"""Which kernel runs: the one place that decides, by device, dtype, rows, and what the processor can do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

from quantlab_kernels import gpu, native, onednn, reference
from quantlab_kernels.activations import ACTIVATIONS, quantize_rows

_PANEL = 4 << 20  # bytes of a decoded panel, which should stay in cache
_BEST = f"cpu-{native.ISAS[-1]}"
_CPU = tuple(f"cpu-{isa}" for isa in (*native.ISAS, native.INT8))
# Products of 8 bits by 8, for activations that a scheme rounds.
_ONEDNN, _W8A8 = "cpu-onednn", "gpu-w8a8"
KERNELS = ("reference", *_CPU, _ONEDNN, "gpu", _W8A8)


@dataclass(frozen=True)
class Choice:
    """What runs a product.

    Attributes:
        kernel: one of :data:`KERNELS`.
        panels: whether the weight is decoded a panel at a time, rounded as activations are; else codes are read as
            they are stored.
        why: the reason, where it is not the best kernel of the machine.
    """

    kernel: str
    panels: bool = False
    why: str = ""

    def __str__(self) -> str:
        return self.kernel + (" by panels" if self.panels else "") + (f" ({self.why})" if self.why else "")


_forced: str | None = os.environ.get("QUANTLAB_KERNEL") or None


def forced() -> str | None:
    """The kernel that ``QUANTLAB_KERNEL`` or :func:`force` asks for, or None.

    Raises:
        ValueError: there is none of this name.
    """
    if _forced is not None and _forced not in KERNELS:
        raise ValueError(f"kernel {_forced!r}: use one of {', '.join(KERNELS)}")
    return _forced


@contextlib.contextmanager
def force(name: str | None) -> Iterator[None]:
    """While this context is open, run no better kernel than ``name``: what it cannot run goes to the next below it.

    ``cpu-avx512-int8`` rounds activations to 8 bits and is not chosen otherwise; docs/kernels.md says how exact it is.

    Raises:
        ValueError: there is none of this name.
    """
    global _forced
    before, _forced = _forced, name
    try:
        forced()
        configure()
        yield
    finally:
        _forced = before
        configure()


def configure() -> None:
    """Tell the operator that is registered in C++ what was forced; :func:`choose` refuses a name that is not known."""
    native.configure(_forced is None or _forced in (*_CPU, _ONEDNN), _at_most())


def _at_most() -> str:
    return (_forced if _forced in _CPU else _BEST).removeprefix("cpu-")


@cache
def _gpu() -> gpu.Answer:
    return gpu.available()


def choose(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    table: torch.Tensor,
    bits: int,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    activations: str | None = None,
) -> Choice:
    """What runs the product of ``x`` with such a weight; arguments as in :func:`quantlab_kernels.quantized_linear`."""
    if activations is None:
        return _chosen(x, codes, scales, zeros, table, bits, None, low_rank)[0]
    if eight := _by_eight(x, scales, zeros, activations):
        return Choice(eight)
    values = x.new_empty(x.shape, dtype=_wide(x.dtype))
    return _chosen(values, codes, scales, zeros, table, bits, None, None, rounded=True)[0]


def _chosen(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    table: torch.Tensor,
    bits: int,
    bias: torch.Tensor | None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None,
    rounded: bool = False,
) -> tuple[Choice, native.Weight | None]:
    """What runs it, and the weight as the compiled kernels see it where it is one of them.

    ``rounded`` activations were rounded to 8 bits as a scheme wants it; no kernel may round them another way.
    """
    if forced() == "reference":
        return Choice("reference", why="forced"), None
    if x.device.type == "cuda":
        answer = _gpu() and gpu.supports(x.dtype, bits, x.shape[-1], scales.shape[1])
        return Choice("gpu") if answer else Choice("reference", why=answer.reason), None
    if x.device.type != "cpu":
        return Choice("reference", why=f"no kernel for {x.device.type}"), None
    if native.library() is None:
        return Choice("reference", why="the CPU kernels were not compiled"), None
    if x.dtype not in native.ACTIVATIONS or scales.dtype not in native.SCALES:
        return Choice("reference", why=f"{x.dtype} activations, {scales.dtype} scales"), None
    rows = x.numel() // x.shape[-1]
    at_most = native.ISAS[-1] if rounded and _at_most() == native.INT8 else _at_most()
    weight = native.Weight(codes, scales, zeros, table, bits, x.shape[-1], bias, low_rank, at_most)
    return Choice(f"cpu-{weight.isa(x.dtype, rows)}", rows > weight.few_rows(x.dtype)), weight


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    table: torch.Tensor,
    bits: int,
    bias: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    offset: int = 0,
    *,
    rounded: bool = False,
) -> torch.Tensor:
    """The product by the kernel that :func:`choose` names; see :func:`quantlab_kernels.quantized_linear`."""
    choice, weight = _chosen(x, codes, scales, zeros, table, bits, bias, low_rank, rounded)
    if choice.kernel == "gpu" and x.numel():
        return gpu.linear(x, codes, scales, zeros, table, bits, offset or None, bias, low_rank)
    if weight is None or x.numel() == 0:
        return reference.quantized_linear(x, codes, scales, zeros, table, bits, bias, low_rank)
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > weight.most_rows(x.dtype):
        weight = weight.alone()
        y = _by_panels(rows, weight) if len(rows) > weight.most_rows(x.dtype) else weight.multiply(rows)
        if low_rank is not None:
            y += (rows @ low_rank[1].to(x.dtype).T) @ low_rank[0].to(x.dtype).T
        if bias is not None:
            y += bias.to(x.dtype)
    else:
        y = weight.multiply(rows)
    return y.view(*x.shape[:-1], -1)


def linear_dynamic(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    table: torch.Tensor,
    bits: int,
    bias: torch.Tensor | None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None,
    offset: int,
    activations: str,
) -> torch.Tensor:
    """The product where each row is rounded to 8 bits first; see :func:`quantlab_kernels.quantized_linear`.

    8 bits by 8 where there is such a product. Else the numbers that rows were rounded to (bfloat16 holds them exactly)
    are multiplied as any others, and their scales afterwards: the same, but for how sums and results are rounded.
    """
    rows = x.reshape(-1, x.shape[-1])
    dtype = ACTIVATIONS[activations]
    values, steps = quantize_rows(rows, dtype)
    eight = _by_eight(x, scales, zeros, activations)
    if eight == _W8A8:
        weight = gpu.weight_w8a8(codes, scales, table, bits, x.shape[-1], dtype)
        y, bias = gpu.product_w8a8(values, steps, *weight, bias, x.dtype), None
    elif len(rows) == 1 and eight is None and x.device.type == "cpu":
        # Its scale becomes a part of the weight's. (GPU kernels keep what they made of scales, and these are new ones.)
        wide, scaled = values.to(_wide(x.dtype)), scales.float() * steps
        y = linear(wide, codes, scaled, zeros, table, bits, offset=offset, rounded=True).to(x.dtype)
    else:
        if eight == _ONEDNN:
            sums = onednn.product(values, codes, scales, table, bits)
        else:
            sums = linear(values.to(_wide(x.dtype)), codes, scales, zeros, table, bits, offset=offset, rounded=True)
        y = torch.mul(sums, steps.unsqueeze(1), out=x.new_empty(sums.shape))
    if low_rank is not None:
        y += (rows @ low_rank[1].to(x.dtype).T) @ low_rank[0].to(x.dtype).T
    if bias is not None:
        y += bias.to(x.dtype)
    return y.view(*x.shape[:-1], -1)


def _by_eight(x: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, activations: str) -> str | None:
    """The kernel that multiplies 8 bits by 8, or None: it wants one scale for all that is summed."""
    if zeros is not None or scales.shape[1] != 1 or not x.numel():
        return None
    if x.device.type == "cuda" and forced() in (None, _W8A8) and _gpu():
        return _W8A8 if gpu.multiplies(ACTIVATIONS[activations], x.device) else None
    if x.device.type != "cpu" or activations != "int8" or not onednn.available():
        return None
    # One row alone is read faster from the codes as they are stored; docs/kernels.md has the measurement.
    pays = x.numel() > x.shape[-1] or native.library() is None
    return _ONEDNN if forced() == _ONEDNN or (forced() is None and pays) else None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of rounded activations are computed in: float16 could not hold them."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _by_panels(x: torch.Tensor, weight: native.Weight) -> torch.Tensor:
    """``x [rows, columns]`` times the weight, never decoded as a whole."""
    outputs = min(max(_PANEL // (x.shape[1] * x.element_size()), 32), weight.outputs)
    panel = x.new_empty(outputs, x.shape[1])  # one for all: its pages stay where they are
    if outputs == weight.outputs:
        return torch.nn.functional.linear(x, weight.decode(0, outputs, panel))
    y = x.new_empty(x.shape[0], weight.outputs)
    for begin in range(0, weight.outputs, outputs):
        end = min(begin + outputs, weight.outputs)
        y[:, begin:end] = torch.nn.functional.linear(x, weight.decode(begin, end, panel))
    return y
