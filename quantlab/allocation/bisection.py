"""Bisection with real evaluations: how many of the least sensitive items can be made coarser within a tolerance.

After arXiv:2306.04879: candidates from the finest to the coarsest; at each, items in the order of their augmented
scores for what they save; the largest number of them, found by bisection, that keeps the tolerance; only these go on to
the next candidate. It takes about ``log2(items)`` evaluations a candidate. Where the measure is not monotone the worst
items are put back, one by one, until it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from quantlab.allocation.choices import Choices, InfeasibleError
from quantlab.allocation.quadratic import augmented

Holds = Callable[[Sequence[int]], bool]
"""Whether a choice, an option for each item, keeps the tolerance: measured."""


def largest(count: int, holds: Callable[[int], bool]) -> int:
    """The largest k of 0 .. count for which ``holds(k)``, if it holds up to some k and not above; 0 is not asked.

    Takes at most ``ceil(log2(count + 1))`` evaluations.
    """
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def search(choices: Choices, holds: Holds) -> tuple[int, ...]:
    """The option of each item: as little cost as the descent finds, within the tolerance.

    Args:
        choices: predicted losses, which only guide, and costs.
        holds: the real measure.

    Raises:
        InfeasibleError: the tolerance is not kept with the finest options.
    """
    scores = augmented(choices).losses
    # From the finest on: by what they cost in sum.
    levels = [int(option) for option in np.argsort(-choices.costs.sum(0), kind="stable")]
    levels = [option for option in levels if np.isfinite(choices.losses[:, option]).all()]
    chosen = [levels[0]] * len(choices.losses)
    if not holds(chosen):
        raise InfeasibleError("the tolerance is not kept even with the finest candidate", choices.cost(chosen))
    remaining = list(range(len(chosen)))
    for level in levels[1:]:
        order = sorted(remaining, key=lambda item: _price(choices, scores, item, chosen[item], level))
        count = largest(len(order), partial(_holds, holds, chosen, order, level))
        chosen, remaining = _coarser(chosen, order[:count], level), order[:count]
        if not remaining:
            break
    return repair(choices, tuple(chosen), levels, holds)


def repair(choices: Choices, chosen: tuple[int, ...], levels: Sequence[int], holds: Holds) -> tuple[int, ...]:
    """Put the item that is predicted to lose most to the next finer level, until the tolerance is kept.

    Args:
        choices: the problem.
        chosen: an option for each item.
        levels: options, from the finest on.
        holds: the real measure.

    Raises:
        InfeasibleError: everything is at the finest level and the tolerance is not kept.
    """
    scores = augmented(choices).losses
    current = list(chosen)
    while not holds(current):
        movable = [item for item, option in enumerate(current) if option != levels[0]]
        if not movable:
            raise InfeasibleError("the tolerance is not kept even with the finest candidate", choices.cost(current))
        worst = max(movable, key=lambda item: scores[item, current[item]])
        current[worst] = levels[levels.index(current[worst]) - 1]
    return tuple(current)


def _coarser(chosen: Sequence[int], items: Sequence[int], level: int) -> list[int]:
    return [level if item in set(items) else option for item, option in enumerate(chosen)]


def _holds(holds: Holds, chosen: Sequence[int], order: Sequence[int], level: int, count: int) -> bool:
    return holds(_coarser(chosen, order[:count], level))


def _price(choices: Choices, scores: np.ndarray, item: int, now: int, level: int) -> float:
    """What an item is predicted to lose more at a level, for each unit of cost that it frees."""
    freed = choices.costs[item, now] - choices.costs[item, level]
    return float((scores[item, level] - scores[item, now]) / max(freed, 1e-12))
