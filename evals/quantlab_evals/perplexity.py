"""Perplexity, with one stated definition, its interval, and everything needed to repeat it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .bootstrap import CONFIDENCE, DRAWS, ClusterMeans, Comparison, Interval, bootstrap_interval, compare
from .errors import EvalError
from .logits import Progress, describe_model, refuse_nan, run_measures
from .windows import Windows

WINDOW_LENGTH = 2048
"""Tokens in a window where nothing else is asked for."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one model on one set of windows.

    `nll` is in nats a token; `tokens` counts the predicted ones. `interval` is the 95 % bootstrap interval
    of the perplexity over `clusters` (documents or windows), None for a single one. `clusters` holds the
    mean negative log-likelihood of each. `settings` holds every choice that was made, the definition in
    words among them.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    interval: Interval | None
    clusters: ClusterMeans
    settings: dict[str, Any]


@dataclass(frozen=True)
class NllDifference:
    """How much worse a model predicts than its reference: `nll` in nats a token, above 0 is worse.

    `interval` is the 95 % paired bootstrap interval over clusters: what is hard in one is hard for both
    models, so it is much narrower than the intervals of the two perplexities. None for a single cluster.
    """

    nll: float
    interval: Interval | None

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of the model over that of the reference."""
        return exp(self.nll)

    @property
    def perplexity_ratio_interval(self) -> Interval | None:
        """The interval of `perplexity_ratio`."""
        return exp_interval(self.interval)


def perplexity(
    model: nn.Module,
    windows: Windows,
    *,
    batch_size: int = 1,
    seed: int = 0,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Measure a causal language model's perplexity on windows of tokens, as `windows.definition` says.

    `chunk` is the number of positions whose logits are in float32 at the same time; it changes memory, not
    the result. `seed` is the bootstrap's. Raises `EvalError` if the model is not a causal language model,
    has fewer positions than a window or another vocabulary, or puts out NaN.
    """
    measure = NllMeasure(windows, "the model")
    run_measures(model, windows, [measure], batch_size=batch_size, chunk=chunk, progress=progress)
    return measure.result(describe_model(model), batch_size=batch_size, seed=seed)


class NllMeasure:
    """The negative log-likelihood of every predicted token: one number a token is kept.

    `who` is how messages call the model.
    """

    def __init__(self, windows: Windows, who: str) -> None:
        self.windows = windows
        self.who = who
        self.nll = torch.empty(len(windows), windows.predicted)

    def add(self, window: int, part: slice, log_q: Tensor, targets: Tensor) -> None:
        """Take some positions of a window."""
        self.put(window, part, token_nll(log_q, targets))

    def put(self, window: int, part: slice, nll: Tensor) -> None:
        """Take some positions of a window whose negative log-likelihood is known."""
        self.nll[window, part] = nll.cpu()

    def end_window(self, window: int) -> None:
        """Refuse a window that is not all numbers."""
        refuse_nan(self.nll[window], window, self.who)

    def result(self, model: dict[str, Any], *, batch_size: int, seed: int) -> Perplexity:
        """The perplexity; `model` is what `describe_model` says of the model."""
        clusters = self.windows.cluster_means(self.nll)
        nll = float(self.nll.double().mean())
        return Perplexity(
            perplexity=exp(nll),
            nll=nll,
            tokens=self.nll.numel(),
            windows=len(self.windows),
            interval=exp_interval(clusters.interval(seed=seed)),
            clusters=clusters,
            settings={
                "definition": self.windows.definition,
                **self.windows.describe(),
                "predicted_tokens": self.nll.numel(),
                **model,
                "batch_size": batch_size,
                "interval": f"{CONFIDENCE:.0%} bootstrap over {clusters.kind}, {DRAWS} draws",
                "seed": seed,
            },
        )


def paired_difference(model: Perplexity, reference: Perplexity, *, seed: int = 0) -> NllDifference:
    """Compare two perplexities that were measured on the same windows, by the difference in each cluster.

    Raises `EvalError` if the windows were not the same.
    """
    _check_same_windows(model, reference)
    differences = np.subtract(model.clusters.means, reference.clusters.means)
    interval = bootstrap_interval(differences, model.clusters.tokens, seed=seed)
    return NllDifference(model.nll - reference.nll, interval)


def compare_perplexities(first: Perplexity, second: Perplexity, *, seed: int = 0) -> Comparison:
    """Whether one of two models predicts the same windows better, in units of perplexity.

    Raises `EvalError` if the windows were not the same.
    """
    _check_same_windows(first, second)
    return compare(first.clusters, second.clusters, "perplexity", of=np.exp, seed=seed)


def token_nll(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each token: `[n, vocabulary]` and `[n]` to `[n]`, in nats."""
    return -log_probabilities.gather(-1, targets[:, None]).squeeze(-1)


def _check_same_windows(model: Perplexity, reference: Perplexity) -> None:
    sides = (model, reference)
    hashes = [side.settings["sha256"] for side in sides]
    if hashes[0] != hashes[1] or model.settings["context"] != reference.settings["context"]:
        raise EvalError(
            f"the two perplexities were measured on different windows ({model.windows} and "
            f"{reference.windows} of them, SHA-256 {hashes[0][:12]} and {hashes[1][:12]}, "
            f"{model.settings['context']} and {reference.settings['context']} tokens of context); "
            "measure both on the same ones"
        )


def exp(nll: float) -> float:
    """Perplexity of a mean negative log-likelihood; infinite where it is too large for a float."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def exp_interval(interval: Interval | None) -> Interval | None:
    """The interval of a perplexity."""
    return None if interval is None else (exp(interval[0]), exp(interval[1]))
