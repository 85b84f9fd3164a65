"""Whether numbers are numbers."""

from __future__ import annotations

import torch

# Numbers of 8 bits that are looked at once.
_PIECE = 1 << 20


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of any dtype has neither NaN nor infinities.

    Its ends say so (NaN is both of them), and make no copy: ``isfinite`` takes more memory than the tensor itself.
    torch knows no ends of floats of 8 bits: they become float32, some at a time.
    """
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize > 1:
        return all(bool(end.isfinite()) for end in tensor.aminmax())
    return all(all_finite(piece.float()) for piece in tensor.flatten().split(_PIECE))
