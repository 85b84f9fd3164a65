"""Which kernel runs: the one place that decides, by the device of the activations."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quantlab_kernels import reference

QuantizedLinear = Callable[..., torch.Tensor]

# A faster kernel takes the arguments of `reference.quantized_linear` and is entered here under its device type.
KERNELS: dict[str, QuantizedLinear] = {}


def quantized_linear(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """Run the best kernel for the device of ``x``; arguments as in :func:`reference.quantized_linear`."""
    return KERNELS.get(x.device.type, reference.quantized_linear)(x, *args, **kwargs)
