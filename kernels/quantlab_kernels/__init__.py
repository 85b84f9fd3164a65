"""Low-bit matrix products on raw tensors: no models, no modules, nothing of quantlab."""

from quantlab_kernels.activations import ACTIVATIONS, quantize_rows, rounded
from quantlab_kernels.dispatch import KERNELS, Choice, choose, force, forced
from quantlab_kernels.ops import quantized_linear
from quantlab_kernels.packing import pack, packed_width, unpack
from quantlab_kernels.reference import decode

__all__ = [
    "ACTIVATIONS",
    "KERNELS",
    "Choice",
    "choose",
    "decode",
    "force",
    "forced",
    "pack",
    "packed_width",
    "quantize_rows",
    "quantized_linear",
    "rounded",
    "unpack",
]
