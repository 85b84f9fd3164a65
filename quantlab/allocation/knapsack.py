"""The multiple-choice knapsack, solved exactly by dynamic programming over Pareto-optimal states.

A state is what the items so far cost and lose; of two states, one that costs and loses no less than the other is
dropped (the Pareto pruning of AutoScheme's and L-GreCo's dynamic programs, arXiv:2210.17357, without their buckets).
Costs are bytes, of which there are many different sums, so states are also dropped by bounds: what the rest must lose
at least, by the linear relaxation, against a choice that is known to be possible. Both keep the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantlab.allocation.choices import Choices

# Bounds are compared with room for rounding of sums.
_SLACK = 1e-9


def solve(choices: Choices, budget: float) -> tuple[int, ...]:
    """The option of each item that loses least in sum, with costs in sum within the budget; pairs are not seen.

    Of choices that lose the same it takes the cheapest.

    Raises:
        InfeasibleError: no choice keeps to the budget.
    """
    choices.refuse_above(budget)
    budget = budget * (1 + 1e-12)
    options = [_undominated(losses, costs) for losses, costs in zip(choices.losses, choices.costs, strict=True)]
    # Items whose options differ most come first: what is left is then bounded tightly.
    order = sorted(range(len(options)), key=lambda item: -float(np.ptp(options[item].losses)))
    rest = _Rest([options[item] for item in order])
    best = rest.rounded(budget)
    slack = _SLACK * (abs(best) + float(np.abs([option.losses[0] for option in options]).sum()))
    costs, losses = np.zeros(1), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for stage, item in enumerate(order):
        own = options[item]
        all_costs = (costs[:, None] + own.costs).ravel()
        all_losses = (losses[:, None] + own.losses).ravel()
        possible = all_costs + rest.least_cost(stage + 1) <= budget
        possible[possible] &= all_losses[possible] + rest.bound(stage + 1, budget - all_costs[possible]) <= best + slack
        kept = np.flatnonzero(possible)
        kept = kept[np.lexsort((all_losses[kept], all_costs[kept]))]
        lowest = np.minimum.accumulate(all_losses[kept])
        kept = kept[np.concatenate([[True], all_losses[kept][1:] < lowest[:-1]])]
        costs, losses = all_costs[kept], all_losses[kept]
        trail.append(np.divmod(kept, len(own.costs)))
    chosen = [0] * len(order)
    state = len(losses) - 1  # sorted by cost, losses fall
    for item, (before, option) in zip(reversed(order), reversed(trail), strict=True):
        chosen[item] = int(options[item].index[option[state]])
        state = int(before[state])
    return tuple(chosen)


@dataclass(frozen=True, eq=False)
class _Options:
    """An item's options that no other beats: costs rise, losses fall; ``index`` is their place among all."""

    costs: np.ndarray
    losses: np.ndarray
    index: np.ndarray


def _undominated(losses: np.ndarray, costs: np.ndarray) -> _Options:
    order = [option for option in np.lexsort((losses, costs)) if np.isfinite(losses[option])]
    kept: list[int] = []
    for option in order:
        if not kept or losses[option] < losses[kept[-1]]:
            kept.append(int(option))
    return _Options(costs[kept].astype(float), losses[kept].astype(float), np.array(kept))


class _Rest:
    """What the items from a stage on cost and lose at least, by the linear relaxation.

    Each item's lower convex hull is a row of steps, each so much loss for so much cost. The relaxation takes the best
    steps of all items first.
    """

    def __init__(self, options: list[_Options]) -> None:
        self._options = options
        steps = [_steps(option) for option in options]
        self._stage = np.repeat(np.arange(len(options)), [len(of_item) for of_item in steps])
        self._steps = np.concatenate([np.zeros((0, 2)), *steps])
        best_first = np.argsort(-self._steps[:, 1] / self._steps[:, 0], kind="stable")
        self._stage, self._steps = self._stage[best_first], self._steps[best_first]
        least = [[option.costs[0], option.losses[0]] for option in options]
        self._least = np.concatenate([np.cumsum(np.array(least)[::-1], axis=0)[::-1], [[0.0, 0.0]]])

    def least_cost(self, stage: int) -> float:
        return float(self._least[stage, 0])

    def bound(self, stage: int, budgets: np.ndarray) -> np.ndarray:
        """The least loss of the items from ``stage`` on, for each of some budgets that are enough for them."""
        steps = self._steps[self._stage >= stage] * [1, -1]
        costs, losses = np.cumsum(np.concatenate([self._least[[stage]], steps]), axis=0).T
        return np.interp(budgets, costs, losses)

    def rounded(self, budget: float) -> float:
        """The loss of a possible choice: the best steps of all items, as long as they can be paid."""
        steps = [
            (loss / cost, cost, loss, item)
            for item, option in enumerate(self._options)
            for cost, loss in _steps(option)
        ]
        left = budget - self.least_cost(0)
        total = float(self._least[0, 1])
        stopped: set[int] = set()
        for _, cost, loss, item in sorted(steps, key=lambda step: -step[0]):
            if item not in stopped and cost <= left:
                left, total = left - cost, total - loss
            else:
                stopped.add(item)  # an item's later steps start where this one would have ended
        return total


def _steps(option: _Options) -> np.ndarray:
    """An item's lower convex hull, as steps ``[n, 2]`` of cost and of loss that is saved."""
    hull = [0]
    for point in range(1, len(option.costs)):
        while len(hull) > 1 and _above(option, hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return np.stack([np.diff(option.costs[hull]), -np.diff(option.losses[hull])], axis=1)


def _above(option: _Options, a: int, b: int, c: int) -> bool:
    """Whether point b lies on or above the line from a to c."""
    (cost_a, cost_b, cost_c), (loss_a, loss_b, loss_c) = option.costs[[a, b, c]], option.losses[[a, b, c]]
    return bool((loss_b - loss_a) * (cost_c - cost_a) >= (loss_c - loss_a) * (cost_b - cost_a))
