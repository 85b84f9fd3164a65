"""Repairs of the error that rounding leaves. One file a kind of repair."""

from quantlab.compensation import low_rank, statistics  # noqa: F401 - entered in the registry by being imported
from quantlab.compensation.base import (
    Compensation,
    Outlook,
    PlansAhead,
    compensation_names,
    compensation_options,
    make_compensation,
    register,
)

__all__ = [
    "Compensation",
    "Outlook",
    "PlansAhead",
    "compensation_names",
    "compensation_options",
    "make_compensation",
    "register",
]
