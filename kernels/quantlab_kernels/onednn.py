"""int8 x int8 through oneDNN, as torch has it: for activations that a scheme rounds to 8 bits.

oneDNN wants the weight in an order of its own, which is made at the first product and kept beside the codes for as long
as these live: a byte a weight more. (Its product of a weight in any other order is no faster than bfloat16.)
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from quantlab_kernels.activations import values_of_codes
from quantlab_kernels.kept import Kept


@cache
def available() -> bool:
    """Whether torch has the product, and the processor multiplies bytes without saturating sums of two of them."""
    return hasattr(torch.ops.onednn, "qlinear_prepack") and torch.cpu._is_vnni_supported()


class _Weight(NamedTuple):
    """A weight in oneDNN's order, and the scale (float32) and zero of each output."""

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


_kept: Kept[_Weight] = Kept()


def product(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, bits: int) -> torch.Tensor:
    """``x @ W.T`` in float32, from sums in int32.

    Args:
        x: int8 ``[rows, in]``, contiguous.
        codes: uint8 ``[out, packed_width(in, bits)]``.
        scales: ``[out, 1]`` or ``[1, 1]``.
        table: of integers from -128 to 127.
        bits: width of a code.
    """

    def make(_: _Weight | None) -> _Weight:
        integers = values_of_codes(codes, table, bits, x.shape[1], torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(integers, None)
        steps = scales.float().flatten().expand(len(codes)).contiguous()
        return _Weight(packed, steps, torch.zeros(len(codes), dtype=torch.int64))

    weight = _kept.of(codes, (scales, table), make)
    unsigned = x.view(torch.uint8).bitwise_xor(128)  # it takes no other activations, and takes the 128 more off again
    # No bias, the output as it is, nothing behind it.
    rest: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "")
    return torch.ops.onednn.qlinear_pointwise(unsigned, 1.0, 128, *weight, *rest)
