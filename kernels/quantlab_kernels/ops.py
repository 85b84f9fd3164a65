"""``torch.ops.quantlab.linear``: one op that torch.compile and torch.export see, whatever runs it.

``linear`` is what models call. On the CPU its implementation is in C++ where that could be built
(``csrc/torch_op.cpp``), which runs products of few rows itself and hands the others to ``linear_any``; else both are
:mod:`quantlab_kernels.dispatch`.
"""

from __future__ import annotations

import torch

from quantlab_kernels import dispatch, native

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
    _offset: int,
    bias: torch.Tensor | None,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
) -> torch.Tensor:
    low_rank = None if left is None or right is None else (left, right)
    return dispatch.linear(x, codes, scales, zeros, table, bits, bias, low_rank)


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
        bias: ``[out]`` or None.
        low_rank: ``(A [out, rank], B [rank, in])``: adds ``x @ B.T @ A.T``.
        offset: where the table is the integers ``code + offset``, the offset (which is negative); else 0.

    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    left, right = low_rank or (None, None)
    return torch.ops.quantlab.linear(x, packed, scales, zeros, table, bits, offset, bias, left, right)
