"""``torch.ops.quantlab.linear``: one op that torch.compile and torch.export see, whatever runs it.

``linear`` is what models call. On the CPU its implementation is in C++ where that could be built
(``csrc/torch_op.cpp``), which runs products of few rows itself and hands the others to ``linear_any``; else both are
:mod:`quantlab_kernels.dispatch`.
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
_LIBRARY = torch.library.Library("quantlab", "DEF")
_LIBRARY.define(f"linear({_ARGUMENTS}) -> Tensor")
_LIBRARY.define(f"linear_any({_ARGUMENTS}) -> Tensor")


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
) -> torch.Tensor:
    low_rank = None if left is None or right is None else (left, right)
    return dispatch.linear(x, codes, scales, zeros, table, bits, bias, low_rank, offset)


def _fake(x: torch.Tensor, codes: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


for _name in ("linear", "linear_any"):  # for all devices
    _LIBRARY.impl(_name, _linear, "CompositeExplicitAutograd")
if native.register():  # and in C++ for the CPU
    dispatch.configure()
torch.library.register_fake("quantlab::linear", _fake, lib=_LIBRARY)
torch.library.register_fake("quantlab::linear_any", _fake, lib=_LIBRARY)


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

    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    left, right = low_rank or (None, None)
    arguments = (packed, scales, zeros, table, bits, offset, bias, left, right)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Differentiable.apply(x, *arguments)
    return torch.ops.quantlab.linear(x, *arguments)


class _Differentiable(torch.autograd.Function):
    """The same product, for adapters trained on top of a quantized model: the weight itself has no gradient."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        context.columns, context.arguments = x.shape[-1], arguments
        return torch.ops.quantlab.linear(x, *arguments)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        codes, scales, zeros, table, bits, _, _, left, right = context.arguments
        weight = reference.decode(unpack(codes, bits, context.columns), scales, zeros, table, gradient.dtype)
        back = gradient @ weight
        if left is not None and right is not None:
            back = back + (gradient @ left.to(gradient.dtype)) @ right.to(gradient.dtype)
        return back, *(None for _ in context.arguments)
