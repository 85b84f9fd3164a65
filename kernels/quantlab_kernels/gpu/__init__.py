"""Low-bit products on GPUs, in Triton. Importing this asks no driver; :func:`available` says whether they can run here.

The pieces, from the bits up: ``layout`` (how codes lie in memory) and ``formats`` (what they mean) are plain torch;
``ptx`` and ``decode`` turn bits into numbers inside a kernel; ``gemv``, ``gemm``, ``panels`` and ``w8a8`` are the
kernels; ``configs`` and ``tune`` say how work is cut up; ``plans`` and ``launch`` carry a product out; ``weight`` and
``matmul`` are what a caller sees. ``offline``, ``cases`` and ``check`` hold the compiled kernels to what they are meant
to be, without a GPU; ``gpu_check``, ``gpu_speed`` and their ``subjects`` are for a machine that has one. What needs
triton is imported when it is first asked for.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from quantlab_kernels.gpu.layout import Layout

if TYPE_CHECKING:
    from quantlab_kernels.gpu.matmul import linear, product
    from quantlab_kernels.gpu.w8a8 import multiplies, product_w8a8, weight_w8a8
    from quantlab_kernels.gpu.weight import prepare

__all__ = [
    "Answer",
    "available",
    "linear",
    "multiplies",
    "prepare",
    "product",
    "product_w8a8",
    "supports",
    "weight_w8a8",
]


@dataclass(frozen=True)
class Answer:
    """Yes, or no and why: true or false where a truth value is asked for.

    Attributes:
        reason: empty for yes.
    """

    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason


def available() -> Answer:
    """Whether the kernels can run here. Asks the driver."""
    if importlib.util.find_spec("triton") is None:
        return Answer("triton is not installed (`pip install triton`; it exists for Linux)")
    if not torch.cuda.is_available():
        build = torch.version.cuda or torch.version.hip
        return Answer("torch sees no GPU" if build else "torch is built for the CPU alone, and sees no GPU")
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return Answer(f"the GPU is of compute capability {major}.{minor}; the kernels are for 8.0 and newer")
    return Answer()


def supports(dtype: torch.dtype, bits: int, columns: int, groups: int) -> Answer:
    """Whether the kernels multiply such activations and such a weight.

    Args:
        dtype: of the activations.
        bits: width of a code.
        columns: inputs of the layer.
        groups: scales in a row of the weight.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return Answer(f"activations are {dtype}: the GPU kernels multiply float16 and bfloat16")
    try:
        Layout.of(bits, columns, groups)
    except ValueError as error:
        return Answer(str(error))
    return Answer()


_HOMES = {"linear": "matmul", "product": "matmul", "prepare": "weight"}
_HOMES |= dict.fromkeys(("multiplies", "product_w8a8", "weight_w8a8"), "w8a8")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quantlab_kernels.gpu' has no attribute {name!r}")
    return getattr(import_module(f"quantlab_kernels.gpu.{_HOMES[name]}"), name)
