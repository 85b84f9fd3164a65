"""Repairs of the error that rounding leaves. One file a method."""

from quantlab.compensation.base import (
    Compensation,
    compensation_names,
    compensation_options,
    make_compensation,
    register,
)

__all__ = ["Compensation", "compensation_names", "compensation_options", "make_compensation", "register"]
