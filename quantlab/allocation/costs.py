"""What layers cost under candidates, in the unit that a budget limits; and what to say of an infeasible one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from quantlab.allocation.budget import Budget
from quantlab.allocation.choices import InfeasibleError

BYTES, CODES, SECONDS = "bytes", "bytes of codes", "seconds"


@dataclass(frozen=True, eq=False)
class Costs:
    """Costs of layers.

    Attributes:
        unit: ``bytes`` of everything stored, ``bytes of codes``, or ``seconds`` of a decoded token.
        by_layer: of each layer under each candidate; infinite where it cannot be had.
        weights: of all layers together.
        fixed: what everything that takes no part costs.
    """

    unit: str
    by_layer: Mapping[str, np.ndarray]
    weights: int = 0
    fixed: float = 0.0

    def of_items(self, items: Sequence[Sequence[str]]) -> np.ndarray:
        """``[items, candidates]``."""
        return np.stack([np.sum([self.by_layer[name] for name in members], axis=0) for members in items])

    def limit(self, budget: Budget) -> float:
        """What the layers that take part may cost."""
        if budget.kind in ("bits", "code-bits"):
            return budget.limit * self.weights / 8
        return budget.limit - self.fixed

    def infeasible(self, budget: Budget, least: float) -> InfeasibleError:
        """The error that says what is feasible; ``least`` is what the layers that take part cost at least."""
        most = sum(float(costs[np.isfinite(costs)].max()) for costs in self.by_layer.values())
        low, high = self._asked(budget, least), self._asked(budget, most)
        fixed = ""
        if budget.kind not in ("bits", "code-bits"):
            fixed = f", {replace(budget, limit=self.fixed)} of it for what takes no part"
        return InfeasibleError(
            f"budget {budget}: these candidates take at least {replace(budget, limit=low)}{fixed}, and at most "
            f"{replace(budget, limit=high)}; ask for as much, or add a smaller candidate, for example --candidates "
            "formats=int2,...",
            low,
        )

    def _asked(self, budget: Budget, cost: float) -> float:
        """The budget that allows a cost, rounded up to what a person would type."""
        if budget.kind in ("bits", "code-bits"):
            return math.ceil(8 * cost / self.weights * 1000) / 1000
        return cost + self.fixed if self.unit == SECONDS else math.ceil(cost + self.fixed)
