"""Solvers by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quantlab.allocation import knapsack, milp, quadratic
from quantlab.allocation.choices import Choices
from quantlab.errors import RecipeError

Solver = Callable[[Choices, float], Sequence[int]]

_SOLVERS: dict[str, Solver] = {
    "auto": quadratic.solve,  # the knapsack, where there are no pairs
    "knapsack": lambda choices, budget: knapsack.solve(Choices(choices.losses, choices.costs), budget),
    "milp": milp.solve,
    "search": quadratic.search,
}
SOLVERS = tuple(_SOLVERS)


def solver_called(name: str) -> Solver:
    """A solver by name.

    Raises:
        RecipeError: there is none.
    """
    if name not in _SOLVERS:
        raise RecipeError(f"solver {name!r}: use one of {', '.join(SOLVERS)}")
    return _SOLVERS[name]
