"""Activations of 8 bits: which weights they can be multiplied with. How they are rounded: ``quantlab_kernels``."""

from __future__ import annotations

import quantlab_kernels

from quantlab.numerics.format import Format
from quantlab.numerics.scale import Granularity

ACTIVATIONS = ("none", *quantlab_kernels.ACTIVATIONS)
"""What a layer's inputs can be rounded to, a scale a token, as they come."""


def reason_against(activations: str, form: Format, granularity: Granularity, symmetric: bool) -> str | None:
    """Why a weight cannot meet such activations, with the remedy; None if it can.

    The two are multiplied as 8-bit numbers, and sums are scaled once: by the token's scale and the row's.
    """
    if activations == "none":
        return None
    if activations == "int8" and not (form.grid is not None and form.grid.is_integer):
        return f"they are integers, and {form.name} is none; use an integer format such as int8"
    if activations == "fp8" and form.name != "e4m3":
        return (
            f"they are e4m3, and the weight is {form.name}; use format e4m3, or activations int8 with an integer format"
        )
    if isinstance(granularity, int):
        return f"a sum has one scale, and the weight has one for every {granularity} inputs; use granularity channel"
    if not symmetric:
        return "zeros have no place in such a product; use symmetric: true"
    return None
