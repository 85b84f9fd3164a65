"""The reference: dequantize, then multiply, in plain torch on any device. Faster kernels must agree with it."""

from __future__ import annotations

import torch

from quantlab_kernels.packing import unpack

# Weights that are decoded at once: what lies between two steps stays in the cache, where the system has no new pages to
# find for it. Ten times as fast as all at once.
_CHUNK = 1 << 18


def decode(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    table: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Weights from codes: ``(table[code] - zero) * scale``, computed in float32 and rounded once to ``dtype``.

    Args:
        codes: uint8 ``[out, in]``, indices into ``table``.
        scales: ``[out, groups]``, ``[out, 1]`` or ``[1, 1]``; a group is ``in / groups`` neighbouring inputs.
        zeros: like ``scales``, in units of the table, or None.
        table: ``[<= 256]`` values.
        dtype: of the result.

    Returns:
        ``[out, in]``.
    """
    rows, columns = codes.shape
    step = max(1, _CHUNK // max(1, columns))
    if rows <= step:
        return _decode(codes, scales, zeros, table).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        own = part if len(scales) > 1 else slice(None)
        out[part] = _decode(codes[part], scales[own], None if zeros is None else zeros[own], table)
    return out


def _decode(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, table: torch.Tensor) -> torch.Tensor:
    rows, columns = codes.shape
    groups = scales.shape[1]
    # index_select is twice as fast as indexing here, and this is most of what the reference costs.
    values = table.float().index_select(0, codes.flatten().int()).view(rows, groups, columns // groups)
    if zeros is not None:
        values = values - zeros.float().unsqueeze(-1)
    return (values * scales.float().unsqueeze(-1)).flatten(1)


def quantized_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    table: torch.Tensor,
    bits: int,
    bias: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """``x @ W.T + bias`` with W given by packed codes.

    Args:
        x: ``[..., in]``, float16, bfloat16 or float32.
        packed: uint8 ``[out, packed_width(in, bits)]``, see :mod:`quantlab_kernels.packing`.
        scales: see :func:`decode`.
        zeros: see :func:`decode`.
        table: see :func:`decode`.
        bits: width of a code.
        bias: ``[out]`` or None.
        low_rank: ``(A [out, rank], B [rank, in])``: adds ``x @ B.T @ A.T``.

    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    codes = unpack(packed, bits, x.shape[-1])
    weight = decode(codes, scales, zeros, table, x.dtype)
    y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if low_rank is not None:
        left, right = low_rank
        y = y + (x @ right.to(x.dtype).T) @ left.to(x.dtype).T
    return y
