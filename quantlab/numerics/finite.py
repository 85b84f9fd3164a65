"""Whether numbers are numbers."""

from __future__ import annotations

import torch


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor that is not empty has neither NaN nor infinities.

    Its ends say so (NaN is both of them), and make no copy: ``isfinite`` takes more memory than the tensor itself.
    """
    return all(bool(end.isfinite()) for end in tensor.aminmax())
