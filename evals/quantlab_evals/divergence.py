"""How far a model's predictions are from its reference's: KL divergence, agreement, and both perplexities.

More sensitive than perplexity, in which gains on some tokens hide losses on others (arXiv:2407.09141, where
a disagreement is called a flip).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .bootstrap import Interval, bootstrap_interval
from .errors import EvalError
from .logits import check_model, evaluating, position_chunks, refuse_nan, window_logits
from .perplexity import NllDifference, Perplexity, Progress, mean, paired_difference, summarize, token_nll
from .windows import Windows

DEFINITION = (
    "KL(reference || model) of the next-token distributions in nats, at every position of a window that "
    "predicts a token; agreement: the share of positions where both models rank the same token first; "
    "median and 99th percentile are over tokens, by nearest rank"
)


@dataclass(frozen=True)
class Divergence:
    """How a model differs from its reference on one set of windows. KL is in nats a token.

    Intervals are 95 % bootstrap intervals over windows, None for a single window. `agreement` is a share,
    0 to 1. `model` and `reference` are the perplexities, from the same pass, and `difference` compares them.
    """

    kl: float
    kl_interval: Interval | None
    kl_median: float
    kl_p99: float
    kl_max: float
    agreement: float
    agreement_interval: Interval | None
    difference: NllDifference
    model: Perplexity
    reference: Perplexity
    tokens: int
    settings: dict[str, Any]


def divergence(
    model: nn.Module,
    reference: nn.Module,
    windows: Windows,
    *,
    batch_size: int = 1,
    seed: int = 0,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> Divergence:
    """Compare a model with its reference on windows of tokens, as `DEFINITION` says.

    Each model sees each window once, and one number a token is kept. The models may be on different
    devices. Raises `EvalError` as `perplexity` does, or if the two vocabularies differ in size.
    """
    check_model(model, windows)
    check_model(reference, windows)
    kl: list[Tensor] = []
    agreement: list[float] = []
    nll: list[float] = []
    reference_nll: list[float] = []
    with evaluating(model, reference):
        passes = zip(
            window_logits(model, windows, batch_size),
            window_logits(reference, windows, batch_size),
            strict=True,
        )
        for index, ((logits, targets), (reference_logits, _)) in enumerate(passes):
            _check_vocabularies(logits, reference_logits)
            pieces = [
                _compare(logits[part], reference_logits[part], targets[part]) for part in position_chunks(logits, chunk)
            ]
            del logits, reference_logits
            token_kl, token_agrees, token_nll_q, token_nll_p = map(torch.cat, zip(*pieces, strict=True))
            refuse_nan(token_nll_q, index, "the model")
            refuse_nan(token_nll_p, index, "the reference")
            kl.append(token_kl.cpu())
            agreement.append(mean(token_agrees))
            nll.append(mean(token_nll_q))
            reference_nll.append(mean(token_nll_p))
            if progress is not None:
                progress(index + 1, len(windows))

    of_model = summarize(model, windows, nll, batch_size=batch_size, seed=seed)
    of_reference = summarize(reference, windows, reference_nll, batch_size=batch_size, seed=seed)
    kl_mean = [mean(window) for window in kl]
    kl_all = torch.cat(kl).numpy()
    return Divergence(
        kl=float(np.mean(kl_mean)),
        kl_interval=bootstrap_interval(kl_mean, seed=seed),
        kl_median=float(np.quantile(kl_all, 0.5, method="inverted_cdf")),
        kl_p99=float(np.quantile(kl_all, 0.99, method="inverted_cdf")),
        kl_max=float(kl_all.max()),
        agreement=float(np.mean(agreement)),
        agreement_interval=bootstrap_interval(agreement, seed=seed),
        difference=paired_difference(of_model, of_reference, seed=seed),
        model=of_model,
        reference=of_reference,
        tokens=kl_all.size,
        settings={**of_model.settings, "definition": DEFINITION},
    )


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, in nats: two `[n, vocabulary]` of log-probabilities to `[n]`."""
    p = log_p.exp()
    # A token that p rules out adds nothing, even where q rules it out, too. Rounding must not go below 0.
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1).clamp_min(0)


def _compare(logits: Tensor, reference_logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """KL, whether both rank the same token first, and the two negative log-likelihoods: `[n]` each."""
    log_q = logits.float().log_softmax(-1)
    log_p = reference_logits.to(log_q.device).float().log_softmax(-1)
    agrees = log_q.argmax(-1) == log_p.argmax(-1)
    return kl_divergence(log_p, log_q), agrees, token_nll(log_q, targets), token_nll(log_p, targets)


def _check_vocabularies(logits: Tensor, reference_logits: Tensor) -> None:
    ours, theirs = logits.shape[-1], reference_logits.shape[-1]
    if ours != theirs:
        raise EvalError(
            f"the model's vocabulary has {ours} entries and the reference's {theirs}; distributions over "
            "different vocabularies cannot be compared: give the model that this one was made from"
        )
