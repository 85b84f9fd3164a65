"""Activations of 8 bits, rounded as they come: one scale a row (a token), symmetric, nothing kept from before."""

from __future__ import annotations

import torch

from quantlab_kernels import native
from quantlab_kernels.packing import unpack

ACTIVATIONS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What rows can be rounded to, by the names that schemes use."""

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_LEAST = torch.finfo(torch.float32).tiny
# Weights that are looked up at once: their indices take four times as much memory as the weights.
_CHUNK = 1 << 20


def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as 8-bit numbers, the largest magnitude of each at the end of the range, and their scales.

    A row of zeros, or of numbers so small that float32 cannot hold their scale exactly, becomes zeros. A row with a NaN
    or an infinity becomes zeros with a scale that is not finite: whatever is computed from it is NaN.

    Args:
        x: ``[rows, columns]``, float16, bfloat16 or float32.
        dtype: int8 (-127 to 127) or float8_e4m3fn (-448 to 448).

    Returns:
        ``[rows, columns]`` in ``dtype``, rounded to nearest, ties to even, and float32 ``[rows]``: ``x`` is about their
        product.
    """
    if not x.numel():
        return x.to(dtype), x.new_zeros(len(x), dtype=torch.float32)
    if dtype == torch.int8 and (found := native.round_rows(x)):
        return found
    scales = x.abs().amax(1).float() / _LARGEST[dtype]
    scales.masked_fill_(scales < _LEAST, 0)
    ratio = x / scales.unsqueeze(1)  # float32; without a scale NaN or infinite, else within half a step of the range
    if dtype == torch.int8:
        ratio.round_()
    return ratio.nan_to_num_(0, 0, 0).to(dtype), scales


def rounded(x: torch.Tensor, activations: str) -> torch.Tensor:
    """What activations ``[..., columns]`` are after rounding, in the dtype of ``x``; see :func:`quantize_rows`."""
    codes, scales = quantize_rows(x.reshape(-1, x.shape[-1]), ACTIVATIONS[activations])
    return (codes.float() * scales.unsqueeze(1)).to(x.dtype).view(x.shape)


def values_of_codes(
    codes: torch.Tensor, table: torch.Tensor, bits: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """A packed weight as the 8-bit numbers that such activations are multiplied with.

    Args:
        codes: uint8 ``[out, packed_width(columns, bits)]``, see :mod:`quantlab_kernels.packing`.
        table: of values that ``dtype`` holds exactly.
        bits: width of a code.
        columns: inputs.
        dtype: int8 or float8_e4m3fn.

    Returns:
        ``[out, columns]`` in ``dtype``, contiguous.

    Raises:
        ValueError: it does not hold the table.
    """
    values = table.to(dtype)
    if not torch.equal(values.float(), table.float()):
        raise ValueError(f"{dtype} does not hold the table of the codes, {table.min():g} to {table.max():g}")
    out = torch.empty(len(codes), columns, dtype=torch.uint8, device=codes.device)
    step = max(1, _CHUNK // max(1, columns))
    for some, into in zip(codes.split(step), out.split(step), strict=True):
        into.copy_(values.view(torch.uint8)[unpack(some, bits, columns).int()])
    return out.view(dtype)
