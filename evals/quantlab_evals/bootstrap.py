"""How far a mean over windows would move if other windows had been drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]

CONFIDENCE = 0.95
DRAWS = 1000


def bootstrap_interval(
    values_per_window: Sequence[float] | NDArray[np.float64],
    weights: Sequence[float] | NDArray[np.float64] | None = None,
    *,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval | None:
    """Percentile bootstrap interval of the weighted mean of one value a window (Efron 1979).

    Windows are drawn with replacement, not tokens: the tokens of a window depend on each other. `weights`
    are the tokens of each window; equal if None. The same `seed` and number of windows draws the same
    windows, so intervals of two quantities of one pass belong together. None where there is nothing to
    say of the spread: fewer than two windows, or a value that is not finite.
    """
    values = np.asarray(values_per_window, dtype=np.float64)
    weight = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    windows = len(values)
    if windows < 2 or not np.isfinite(values).all():
        return None
    counts = np.random.default_rng(seed).multinomial(windows, np.full(windows, 1 / windows), size=draws)
    means = (counts @ (values * weight)) / (counts @ weight)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
