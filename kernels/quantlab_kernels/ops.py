"""``torch.ops.quantlab.linear``: one op that torch.compile and torch.export see, whatever runs it; and
``torch.ops.quantlab.linear_dynamic``, the same for activations that are rounded to 8 bits first.

``linear`` is what models call; ``linears`` is several of them that share their input, which
:mod:`quantlab_kernels.compiled` finds in a graph: their outputs side by side. On the CPU the implementation is in C++
where that could be built (``csrc/torch_op.cpp``), which runs products of few rows itself and hands the others to
``linear_any`` and ``linears_any``; else all of them are :mod:`quantlab_kernels.dispatch`.
"""

from __future__ import annotations

from typing import Any

import torch

from quantlab_kernels import dispatch, native, reference
from quantlab_kernels.packing import unpack

_ARGUMENTS = (
    "Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor table, int bits, int offset, Tensor? bias, "
    "Tensor? left, Tensor? right"
)
_SEVERAL = "Tensor x, Tensor[] codes, Tensor[] scales, Tensor[] zeros, Tensor[] tables, int bits, Tensor[] biases"
_LIBRARY = torch.library.Library("quantlab", "DEF")
for _name in ("linear", "linear_any"):
    _LIBRARY.define(f"{_name}({_ARGUMENTS}) -> Tensor")
for _name in ("linears", "linears_any"):
    _LIBRARY.define(f"{_name}({_SEVERAL}) -> Tensor")
_LIBRARY.define(f"linear_dynamic({_ARGUMENTS}, str activations) -> Tensor")


def _linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    table: torch.Tensor,
    bits: int,
    offset: int,
    bias: torch.Tensor | None,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    activations: str | None = None,
) -> torch.Tensor:
    low_rank = None if left is None or right is None else (left, right)
    if activations is None:
        return dispatch.linear(x, codes, scales, zeros, table, bits, bias, low_rank, offset)
    return dispatch.linear_dynamic(x, codes, scales, zeros, table, bits, bias, low_rank, offset, activations)


def _fake(x: torch.Tensor, codes: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _linears(
    x: torch.Tensor,
    codes: list[torch.Tensor],
    scales: list[torch.Tensor],
    zeros: list[torch.Tensor],
    tables: list[torch.Tensor],
    bits: int,
    biases: list[torch.Tensor],
) -> torch.Tensor:
    absent = [None] * len(codes)
    weights = zip(codes, scales, zeros or absent, tables, biases or absent, strict=True)
    return torch.cat([dispatch.linear(x, c, s, z, t, bits, b) for c, s, z, t, b in weights], -1)


def _fake_linears(x: torch.Tensor, codes: list[torch.Tensor], *_: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], sum(code.shape[0] for code in codes))


for _name in ("linear", "linear_any", "linear_dynamic"):  # for all devices
    _LIBRARY.impl(_name, _linear, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quantlab::{_name}", _fake, lib=_LIBRARY)
for _name in ("linears", "linears_any"):
    _LIBRARY.impl(_name, _linears, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quantlab::{_name}", _fake_linears, lib=_LIBRARY)
if native.register():  # and in C++ for the CPU
    dispatch.configure()


def quantized_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    table: torch.Tensor,
    bits: int,
    bias: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    offset: int = 0,
    activations: str | None = None,
) -> torch.Tensor:
    """``x @ W.T + bias`` with W given by packed codes, by the best kernel there is.

    Args:
        x: ``[..., in]``, float16, bfloat16 or float32.
        packed: uint8 ``[out, packed_width(in, bits)]``, see :mod:`quantlab_kernels.packing`.
        scales: ``[out, groups]``, ``[out, 1]`` or ``[1, 1]``.
        zeros: like ``scales``, in units of the table, or None.
        table: float32 ``[<= 2**bits]``.
        bits: width of a code.
        bias: ``[out]`` or None; it gets no gradient.
        low_rank: ``(A [out, rank], B [rank, in])``: adds ``x @ B.T @ A.T``. They get no gradient.
        offset: where the table is the integers ``code + offset``, the offset (which is negative); else 0.
        activations: what rows of ``x`` are rounded to first, each with a scale of its own, see
            :func:`quantlab_kernels.quantize_rows`: ``int8``, ``fp8``, or None. The low-rank term sees them as they
            are, and the gradient takes no notice of it.

    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    left, right = low_rank or (None, None)
    arguments = (packed, scales, zeros, table, bits, offset, bias, left, right)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Differentiable.apply(x, activations, *arguments)
    return _run(x, activations, *arguments)


def _run(x: torch.Tensor, activations: str | None, *arguments: Any) -> torch.Tensor:
    if activations is None:
        return torch.ops.quantlab.linear(x, *arguments)
    return torch.ops.quantlab.linear_dynamic(x, *arguments, activations)


class _Differentiable(torch.autograd.Function):
    """The same product, for adapters trained on top of a quantized model: the weight itself has no gradient."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, activations: str | None, *arguments: Any) -> torch.Tensor:
        context.columns, context.arguments = x.shape[-1], arguments
        return _run(x, activations, *arguments)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        codes, scales, zeros, table, bits, _, _, left, right = context.arguments
        weight = reference.decode(unpack(codes, bits, context.columns), scales, zeros, table, gradient.dtype)
        back = gradient @ weight
        if left is not None and right is not None:
            back = back + (gradient @ left.to(gradient.dtype)) @ right.to(gradient.dtype)
        return back, None, *(None for _ in context.arguments)
