"""What a number can be: grids, scales, quantized tensors. Pure functions on tensors."""

from quantlab.numerics.activations import ACTIVATIONS
from quantlab.numerics.finite import all_finite
from quantlab.numerics.fit import Sample
from quantlab.numerics.format import Format, format_called, grid
from quantlab.numerics.grid import Grid
from quantlab.numerics.qtensor import LowRank, QTensor
from quantlab.numerics.scale import Granularity, Scales, apply_scales, choose_scales, group_view, zero_dtype
from quantlab.numerics.scale_type import OuterScales, ScaleType, decode_scales, scale_type

__all__ = [
    "ACTIVATIONS",
    "Format",
    "Granularity",
    "Grid",
    "LowRank",
    "OuterScales",
    "QTensor",
    "Sample",
    "ScaleType",
    "Scales",
    "all_finite",
    "apply_scales",
    "choose_scales",
    "decode_scales",
    "format_called",
    "grid",
    "group_view",
    "scale_type",
    "zero_dtype",
]
