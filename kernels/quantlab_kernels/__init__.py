"""Low-bit matrix products on raw tensors: no models, no modules, nothing of quantlab."""

from quantlab_kernels.dispatch import quantized_linear
from quantlab_kernels.packing import pack, packed_width, unpack
from quantlab_kernels.reference import decode

__all__ = ["decode", "pack", "packed_width", "quantized_linear", "unpack"]
