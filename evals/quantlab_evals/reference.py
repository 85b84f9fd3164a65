"""The reference of a divergence: what is asked of it, and the one that runs beside the model."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import EvalError
from .logits import check_model, describe_model, evaluating, window_logits
from .perplexity import token_nll
from .windows import Windows


@dataclass(frozen=True)
class RecordLoss:
    """What it costs to know a reference by its `top_k` most likely tokens and `sampled` of the others.

    The mean probability of the others is `tail_mass`. Drawing from them leaves the mean KL divergence
    unbiased, with `standard_error` in nats a token. That is checked at `positions` where the whole distribution
    is known: there the record's KL minus the exact one is `difference` on average, with an error of its own,
    `difference_error`, where the exact one is `exact_kl`.
    """

    top_k: int
    sampled: int
    tail_mass: float
    standard_error: float
    difference: float
    difference_error: float
    exact_kl: float
    positions: int


class ReferenceWindow(Protocol):
    """What a reference predicts in one window."""

    def compare(self, part: slice, log_q: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """KL to the model in nats, the first-ranked token, and the negative log-likelihood: `[n]` each.

        `log_q` are the model's log-probabilities `[n, vocabulary]` at the positions `part` of the window.
        """


class Reference(Protocol):
    """A model's predictions on some windows, from wherever they come."""

    @property
    def described(self) -> dict[str, Any]:
        """What `describe_model` says of it."""

    def over(self, windows: Windows, batch_size: int) -> Generator[ReferenceWindow, None, None]:
        """Yield its predictions window by window."""

    def loss(self) -> RecordLoss | None:
        """What its approximation costs, after all windows; None if it is exact."""


class LiveReference:
    """A model that runs over the windows at the same time."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def described(self) -> dict[str, Any]:
        """What `describe_model` says of it."""
        return describe_model(self.model)

    def over(self, windows: Windows, batch_size: int) -> Generator[ReferenceWindow, None, None]:
        """Yield its predictions window by window; raises `EvalError` as `check_model` does."""
        check_model(self.model, windows)
        with evaluating(self.model):
            for logits, _ in window_logits(self.model, windows, batch_size):
                yield _LiveWindow(logits)

    def loss(self) -> None:
        """None: it is exact."""
        return


class _LiveWindow:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def compare(self, part: slice, log_q: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        check_vocabularies(log_q.shape[-1], self.logits.shape[-1])
        log_p = self.logits[part].to(log_q.device).float().log_softmax(-1)
        return kl_divergence(log_p, log_q), log_p.argmax(-1), token_nll(log_p, targets)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, in nats: two `[n, vocabulary]` of log-probabilities to `[n]`."""
    p = log_p.exp()
    # A token that p rules out adds nothing, even where q rules it out, too. Rounding must not go below 0.
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1).clamp_min(0)


def check_vocabularies(ours: int, theirs: int) -> None:
    """Raise `EvalError` unless model and reference have vocabularies of one size."""
    if ours != theirs:
        raise EvalError(
            f"the model's vocabulary has {ours} entries and the reference's {theirs}; distributions over "
            "different vocabularies cannot be compared: give the model that this one was made from"
        )
