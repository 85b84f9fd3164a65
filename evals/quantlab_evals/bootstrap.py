"""How far a mean would move if other text had been drawn, and whether two models can be told apart on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .errors import EvalError

Interval = tuple[float, float]
Values = Sequence[float] | NDArray[np.float64]

CONFIDENCE = 0.95
DRAWS = 1000
FEWEST = 6
"""Clusters below which no two models are told apart: five that agree by chance are one in sixteen."""


@dataclass(frozen=True)
class ClusterMeans:
    """The mean of a quantity in each cluster of tokens, and how many tokens each has.

    The tokens of a cluster depend on each other, so clusters are what is drawn again; `kind` says what they
    are (`windows`, `documents`, `problems`). Two models on the same text have the same clusters.
    """

    kind: str
    tokens: tuple[int, ...]
    means: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over all tokens."""
        return float(np.average(self.means, weights=self.tokens))

    def interval(self, *, seed: int = 0) -> Interval | None:
        """The bootstrap interval of `mean`."""
        return bootstrap_interval(self.means, self.tokens, seed=seed)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same text, by one measure.

    `difference` is second minus first, and `interval` its 95 % paired bootstrap interval: what is hard in a
    cluster is hard for both, so it is much narrower than the intervals of the two values. `better` is None
    where the interval holds zero or there are fewer than `FEWEST` clusters to tell by.
    """

    measure: str
    first: float
    second: float
    difference: float
    interval: Interval | None
    clusters: int
    kind: str
    better: Literal["first", "second"] | None

    def verdict(self, first: str = "A", second: str = "B") -> str:
        """The comparison in a sentence: `B is better than A by 0.21 +- 0.05 (perplexity, 64 windows)`."""
        where = f"({self.measure}, {self.clusters} {self.kind})"
        if self.interval is None or self.clusters < FEWEST:
            return f"not distinguishable {where}: fewer than {FEWEST} {self.kind} say nothing"
        low, high = self.interval
        half = (high - low) / 2
        digits = 2 if half == 0 or not math.isfinite(half) else max(0, 1 - math.floor(math.log10(half)))
        size = f"{abs(self.difference):.{digits}f} +- {half:.{digits}f}"
        if self.better is None:
            return f"not distinguishable: they differ by {size} {where}"
        winner, loser = (first, second) if self.better == "first" else (second, first)
        return f"{winner} is better than {loser} by {size} {where}"


def bootstrap_interval(
    values_per_cluster: Values,
    weights: Values | Sequence[int] | None = None,
    *,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval | None:
    """Bootstrap interval of the weighted mean of one value a cluster of tokens (Efron 1979).

    Clusters (windows, documents) are drawn with replacement, not tokens: the tokens of one depend on each
    other. `weights` are the tokens of each; equal if None. The same `seed` and number of clusters draws the
    same ones, so intervals of two quantities of one pass belong together. None where there is nothing to
    say of the spread: fewer than two clusters, or a value that is not finite.
    """
    values = np.asarray(values_per_cluster, dtype=np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    means = resampled_means(values, weights, draws=draws, seed=seed)
    return expanded_interval(means, len(values), confidence)


def compare(
    first: ClusterMeans,
    second: ClusterMeans,
    measure: str,
    *,
    of: Callable[[NDArray[np.float64]], NDArray[np.float64]] = np.asarray,
    higher_is_better: bool = False,
    draws: int = DRAWS,
    seed: int = 0,
) -> Comparison:
    """Compare two models by a measure that was taken of both on the same clusters of the same text.

    `of` turns a mean into the measure (`numpy.exp` for perplexity). Raises `EvalError` if the clusters differ.
    """
    if (first.kind, first.tokens) != (second.kind, second.tokens):
        raise EvalError(
            f"{measure}: the two were measured on different text, {len(first.tokens)} {first.kind} with "
            f"{sum(first.tokens)} tokens and {len(second.tokens)} {second.kind} with {sum(second.tokens)}; "
            "measure both on the same windows"
        )
    count = len(first.tokens)
    ends = [float(of(np.float64(side.mean))) for side in (first, second)]  # type: ignore[arg-type]
    interval = None
    if count > 1 and np.isfinite([*first.means, *second.means]).all():
        drawn = [of(resampled_means(side.means, side.tokens, draws=draws, seed=seed)) for side in (first, second)]
        interval = expanded_interval(drawn[1] - drawn[0], count, CONFIDENCE)
    better: Literal["first", "second"] | None = None
    if interval is not None and count >= FEWEST and not interval[0] <= 0 <= interval[1]:
        better = "second" if (ends[1] > ends[0]) == higher_is_better else "first"
    return Comparison(measure, ends[0], ends[1], ends[1] - ends[0], interval, count, first.kind, better)


def resampled_means(
    values: Values, weights: Values | Sequence[int] | None, *, draws: int, seed: int
) -> NDArray[np.float64]:
    """Weighted means of clusters drawn with replacement, `[draws]`; equal seeds draw equal clusters."""
    value = np.asarray(values, dtype=np.float64)
    weight = np.ones_like(value) if weights is None else np.asarray(weights, dtype=np.float64)
    count = len(value)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    return np.asarray((drawn @ (value * weight)) / (drawn @ weight))


def expanded_interval(drawn: NDArray[np.float64], clusters: int, confidence: float) -> Interval:
    """The percentile interval of bootstrap draws, widened for few clusters (Hesterberg 2015, section 5.3).

    A plain percentile interval is too narrow by the two factors that separate it from Student's: the
    variance of n draws is short by (n - 1) / n, and its quantiles are the normal's.
    """
    from scipy.stats import norm, t

    tail = norm.cdf(math.sqrt(clusters / (clusters - 1)) * t.ppf((1 - confidence) / 2, clusters - 1))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)
