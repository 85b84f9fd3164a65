"""Repairs of the error that rounding leaves. One file a method."""

from quantlab.compensation import low_rank, statistics  # noqa: F401 - entered in the registry by being imported
from quantlab.compensation.base import (
    Compensation,
    Outlook,
    PlansAhead,
    compensation_names,
    make_compensation,
    register,
)

__all__ = ["Compensation", "Outlook", "PlansAhead", "compensation_names", "make_compensation", "register"]
