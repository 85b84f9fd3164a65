"""Losses of pairs of items: exactly by a mixed-integer program, or by a local search where that is too large.

``min x^T O x`` over one option for each item (CLADO, arXiv:2307.05657), under a budget.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from quantlab.allocation import knapsack, milp
from quantlab.allocation.choices import Choices

# Products of options that the mixed-integer program is given; above it the local search is the answer.
_LARGEST = 20_000


def solve(choices: Choices, budget: float, *, seconds: float = 60.0) -> tuple[int, ...]:
    """The option of each item that loses least, pairs included, within the budget.

    Without pairs, and with few, it is the optimum. With many, or when ``seconds`` are over, it is a choice that no
    change of one item and no exchange between two improves.

    Raises:
        InfeasibleError: no choice keeps to the budget.
    """
    if not choices.pairs:
        return knapsack.solve(choices, budget)
    found = search(choices, budget)
    if len(choices.pairs) * choices.losses.shape[1] ** 2 <= _LARGEST:
        exact = milp.solve(choices, budget, seconds=seconds)
        # Rounding in the solver may exceed the budget by a hair.
        if choices.cost(exact) <= budget * (1 + 1e-12) and choices.loss(exact) < choices.loss(found):
            found = search(choices, budget, exact)
    return found


def augmented(choices: Choices) -> Choices:
    """Each item's own losses and half of what its pairs lose, averaged over the options of the others.

    The expected marginal loss where half of the rest is decided already (arXiv:2306.04879); pairs are gone.
    """
    losses = choices.losses.copy()
    for (i, j), terms in choices.pairs.items():
        own_i, own_j = np.isfinite(choices.losses[i]), np.isfinite(choices.losses[j])
        losses[i] += terms[:, own_j].mean(1) / 2
        losses[j] += terms[own_i].mean(0) / 2
    return Choices(losses, choices.costs)


def search(choices: Choices, budget: float, start: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Descend from ``start`` (the knapsack's answers without pairs, and with augmented losses) by single changes and
    exchanges between two items, the best first, until none improves.

    Raises:
        InfeasibleError: no choice keeps to the budget.
    """
    if start is None:
        starts = [
            knapsack.solve(Choices(choices.losses, choices.costs), budget),
            knapsack.solve(augmented(choices), budget),
        ]
        return min((search(choices, budget, each) for each in starts), key=choices.loss)
    chosen, limit = list(start), budget * (1 + 1e-12)
    items = np.arange(len(chosen))
    tolerance = 1e-12 * (1 + abs(choices.loss(start)))
    while True:
        gains = _marginal(choices, chosen)
        change = gains - gains[items, chosen][:, None]
        price = choices.costs - choices.costs[items, chosen][:, None]
        cost = choices.cost(chosen)
        single = np.where(cost + price <= limit, change, np.inf)
        best, move = float(single.min()), [divmod(int(single.argmin()), single.shape[1])]
        for i, j in combinations(range(len(chosen)), 2):
            both = change[i][:, None] + change[j]
            if (terms := choices.pairs.get((i, j))) is not None:
                now = (chosen[i], chosen[j])
                both = both + terms - terms[:, [now[1]]] - terms[[now[0]]] + terms[now]
            both = np.where(cost + price[i][:, None] + price[j] <= limit, both, np.inf)
            if both.min() < best:
                k, l = divmod(int(both.argmin()), both.shape[1])  # noqa: E741
                best, move = float(both.min()), [(i, k), (j, l)]
        if best >= -tolerance:
            return tuple(chosen)
        for item, option in move:
            chosen[item] = option


def _marginal(choices: Choices, chosen: list[int]) -> np.ndarray:
    """What each option of each item loses with the others as they are, ``[items, options]``."""
    losses = choices.losses.copy()
    for (i, j), terms in choices.pairs.items():
        losses[i] += terms[:, chosen[j]]
        losses[j] += terms[chosen[i]]
    return losses
