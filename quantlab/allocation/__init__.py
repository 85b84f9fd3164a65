"""Which layer gets what: sensitivities, solvers, plans. Sensitivities by the names that commands use."""

from __future__ import annotations

from collections.abc import Callable

from quantlab.allocation import delta_loss, error, hessian, kl, pairwise
from quantlab.allocation.sensitivity import Sensitivity
from quantlab.allocation.task import Task
from quantlab.errors import RecipeError

Measure = Callable[[Task], Sensitivity]

SENSITIVITIES: dict[str, Measure] = {
    "error": error.measure,
    "kl": kl.measure,
    "hessian": hessian.measure,
    "delta-loss": delta_loss.measure,
    "pairwise": pairwise.measure,
}

OF_ITEMS = frozenset({"kl", "pairwise"})
"""Those that measure layers that agree together, and are measured anew where they need not."""


def sensitivity_called(name: str) -> Measure:
    """What measures a sensitivity.

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in SENSITIVITIES:
        raise RecipeError(f"sensitivity {name!r}: use one of {', '.join(SENSITIVITIES)}")
    return SENSITIVITIES[name]
