"""Perplexity, with one stated definition (`DEFINITION`), its interval, and everything needed to repeat it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .bootstrap import CONFIDENCE, DRAWS, Interval, bootstrap_interval
from .errors import EvalError
from .logits import check_model, describe_model, evaluating, position_chunks, refuse_nan, window_logits
from .windows import Windows

DEFINITION = (
    "exp of the mean negative log-likelihood (natural logarithm) per token: the documents are joined as they "
    "stand, tokenized once and cut into windows that do not overlap; the first token of a window is context "
    "only, every other one is predicted from those before it in its window, and all count the same; "
    "log-probabilities in float32, sums in float64"
)
WINDOW_LENGTH = 2048
"""Tokens in a window where nothing else is asked for."""

Progress = Callable[[int, int], None]
"""Called with the windows done and the windows in all."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one model on one set of windows.

    `nll` is in nats a token; `tokens` counts the predicted ones. `interval` is the 95 % bootstrap interval
    of the perplexity over windows, None for a single window. `window_nll` is the mean of each window.
    `settings` holds every choice that was made, the definition in words among them.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    interval: Interval | None
    window_nll: tuple[float, ...]
    settings: dict[str, Any]


@dataclass(frozen=True)
class NllDifference:
    """How much worse a model predicts than its reference: `nll` in nats a token, above 0 is worse.

    `interval` is the 95 % paired bootstrap interval over windows: what is hard in a window is hard for both
    models, so it is much narrower than the intervals of the two perplexities. None for a single window.
    """

    nll: float
    interval: Interval | None

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of the model over that of the reference."""
        return _exp(self.nll)

    @property
    def perplexity_ratio_interval(self) -> Interval | None:
        """The interval of `perplexity_ratio`."""
        return _exp_interval(self.interval)


def perplexity(
    model: nn.Module,
    windows: Windows,
    *,
    batch_size: int = 1,
    seed: int = 0,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Measure a causal language model's perplexity on windows of tokens, as `DEFINITION` says.

    `chunk` is the number of positions whose logits are in float32 at the same time; it changes memory, not
    the result. `seed` is the bootstrap's. Raises `EvalError` if the model is not a causal language model,
    has fewer positions than a window or another vocabulary, or puts out NaN.
    """
    check_model(model, windows)
    window_nll = []
    with evaluating(model):
        for index, (logits, targets) in enumerate(window_logits(model, windows, batch_size)):
            pieces = [
                token_nll(logits[part].float().log_softmax(-1), targets[part])
                for part in position_chunks(logits, chunk)
            ]
            del logits
            nll = torch.cat(pieces)
            refuse_nan(nll, index, "the model")
            window_nll.append(mean(nll))
            if progress is not None:
                progress(index + 1, len(windows))
    return summarize(model, windows, window_nll, batch_size=batch_size, seed=seed)


def paired_difference(model: Perplexity, reference: Perplexity, *, seed: int = 0) -> NllDifference:
    """Compare two perplexities that were measured on the same windows, by the difference of each window.

    Raises `EvalError` if the windows were not the same.
    """
    if model.settings["sha256"] != reference.settings["sha256"]:
        raise EvalError(
            f"the two perplexities were measured on different windows ({model.windows} and "
            f"{reference.windows} of them, SHA-256 {model.settings['sha256'][:12]} and "
            f"{reference.settings['sha256'][:12]}); measure both on the same ones"
        )
    differences = np.subtract(model.window_nll, reference.window_nll)
    return NllDifference(float(differences.mean()), bootstrap_interval(differences, seed=seed))


def token_nll(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each token: `[n, vocabulary]` and `[n]` to `[n]`, in nats."""
    return -log_probabilities.gather(-1, targets[:, None]).squeeze(-1)


def mean(values: Tensor) -> float:
    """Mean of a tensor, in float64."""
    return float(values.double().mean())


def summarize(
    model: nn.Module, windows: Windows, window_nll: Sequence[float], *, batch_size: int, seed: int
) -> Perplexity:
    """Return the perplexity that follows from the mean negative log-likelihood of each window."""
    # Every window predicts the same number of tokens, so the mean over windows is the mean over tokens.
    nll = float(np.mean(window_nll))
    tokens = len(windows) * (windows.length - 1)
    return Perplexity(
        perplexity=_exp(nll),
        nll=nll,
        tokens=tokens,
        windows=len(windows),
        interval=_exp_interval(bootstrap_interval(window_nll, seed=seed)),
        window_nll=tuple(window_nll),
        settings={
            "definition": DEFINITION,
            **windows.describe(),
            "predicted_tokens": tokens,
            **describe_model(model),
            "batch_size": batch_size,
            "interval": f"{CONFIDENCE:.0%} percentile bootstrap over windows, {DRAWS} draws",
            "seed": seed,
        },
    )


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def _exp_interval(interval: Interval | None) -> Interval | None:
    return None if interval is None else (_exp(interval[0]), _exp(interval[1]))
