"""The problem that all solvers share: one option for each item, at the least loss that a budget of cost allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from quantlab.errors import QuantlabError


class InfeasibleError(QuantlabError):
    """No choice keeps to the budget; ``least`` is the smallest cost that one can have."""

    def __init__(self, message: str, least: float) -> None:
        super().__init__(message)
        self.least = least


@dataclass(frozen=True, eq=False)
class Choices:
    """A multiple-choice knapsack: each item takes one of its options.

    Attributes:
        losses: float64 ``[items, options]``; infinite where an item cannot have an option.
        costs: float64 ``[items, options]``, not below 0: bytes, or seconds.
        pairs: what two items lose more, or less, than the sum of their own losses: for items ``(i, j)``, ``i < j``,
            float64 ``[options, options]``.
    """

    losses: np.ndarray
    costs: np.ndarray
    pairs: Mapping[tuple[int, int], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.losses.shape == self.costs.shape
        assert not np.isnan(self.losses).any()
        assert np.isfinite(self.losses).any(1).all(), "an item without an option"
        assert all(i < j for i, j in self.pairs)

    def loss(self, chosen: Sequence[int]) -> float:
        """Of one option for each item, pairs included."""
        own = float(self.losses[np.arange(len(self.losses)), list(chosen)].sum())
        return own + sum(float(terms[chosen[i], chosen[j]]) for (i, j), terms in self.pairs.items())

    def cost(self, chosen: Sequence[int]) -> float:
        """Of one option for each item."""
        return float(self.costs[np.arange(len(self.costs)), list(chosen)].sum())

    def cheapest(self) -> float:
        """The smallest cost that there can be."""
        return float(np.where(np.isfinite(self.losses), self.costs, np.inf).min(1).sum())

    def swapped(self) -> Choices:
        """Costs for losses: the least cost within a budget of loss. Without pairs."""
        allowed = np.isfinite(self.losses)
        return Choices(np.where(allowed, self.costs, np.inf), np.where(allowed, self.losses, np.inf))

    def refuse_above(self, budget: float) -> None:
        """Refuse a budget that no choice keeps to.

        Raises:
            InfeasibleError: says what the least is.
        """
        least = self.cheapest()
        if least > budget * (1 + 1e-12):
            raise InfeasibleError(f"a budget of {budget:.6g} is below the least that is possible, {least:.6g}", least)
