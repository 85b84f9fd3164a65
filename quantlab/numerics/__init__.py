"""What a number can be: grids, scales, quantized tensors. Pure functions on tensors."""

from quantlab.numerics.grid import Grid, grid
from quantlab.numerics.qtensor import LowRank, QTensor
from quantlab.numerics.scale import Granularity, apply_scales, choose_scales, group_view

__all__ = ["Granularity", "Grid", "LowRank", "QTensor", "apply_scales", "choose_scales", "grid", "group_view"]
