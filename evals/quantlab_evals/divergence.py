"""How far a model's predictions are from its reference's: KL divergence, agreement, flips, both perplexities.

More sensitive than perplexity, in which gains on some tokens hide losses on others (arXiv:2407.09141).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .bootstrap import ClusterMeans, Comparison, Interval, compare
from .logits import Progress, describe_model, run_measures
from .perplexity import NllDifference, NllMeasure, Perplexity, compare_perplexities, paired_difference
from .recorded import RecordedReference
from .reference import LiveReference, RecordLoss, Reference, ReferenceWindow
from .windows import Windows

DEFINITION = (
    "KL(reference || model) of the next-token distributions in nats, at every position of a window that "
    "predicts a token; agreement: the share of positions where both models rank the same token first; "
    "flips: the share where one of them ranks the text's own token first and the other does not; "
    "median and 99th percentile are over tokens, by nearest rank"
)


@dataclass(frozen=True)
class Divergence:
    """How a model differs from its reference on one set of windows. KL is in nats a token.

    Intervals are 95 % bootstrap intervals over clusters (documents or windows), None for a single one.
    `agreement`, `flips`, `lost` and `gained` are shares of the tokens, 0 to 1: `lost` are those that only
    the reference ranks first, `gained` those that only the model does, `flips` their sum. `model` and
    `reference` are the perplexities, from the same pass, and `difference` compares them. `record_loss` says
    what it cost that the reference was read from a record, None where it ran.
    """

    kl: float
    kl_interval: Interval | None
    kl_median: float
    kl_p99: float
    kl_max: float
    agreement: float
    agreement_interval: Interval | None
    flips: float
    lost: float
    gained: float
    kl_clusters: ClusterMeans
    agreement_clusters: ClusterMeans
    record_loss: RecordLoss | None
    difference: NllDifference
    model: Perplexity
    reference: Perplexity
    tokens: int
    settings: dict[str, Any]


def divergence(
    model: nn.Module,
    reference: nn.Module | RecordedReference,
    windows: Windows,
    *,
    batch_size: int = 1,
    seed: int = 0,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> Divergence:
    """Compare a model with its reference, running or recorded, on windows of tokens, as `DEFINITION` says.

    Each model sees each window once, and a few numbers a token are kept. Running models may be on different
    devices. Raises `EvalError` as `perplexity` does, or if the two vocabularies differ in size, or if the
    record is of other windows.
    """
    known: Reference = LiveReference(reference) if isinstance(reference, nn.Module) else reference
    nll = NllMeasure(windows, "the model")
    measure = DivergenceMeasure(windows, known, batch_size=batch_size)
    run_measures(model, windows, [nll, measure], batch_size=batch_size, chunk=chunk, progress=progress)
    return measure.result(nll.result(describe_model(model), batch_size=batch_size, seed=seed), seed=seed)


class DivergenceMeasure:
    """KL, the first-ranked tokens and the reference's likelihood, at every predicted token."""

    def __init__(self, windows: Windows, reference: Reference, *, batch_size: int = 1) -> None:
        shape = (len(windows), windows.predicted)
        self.windows = windows
        self.reference = reference
        self.batch_size = batch_size
        self._passes = reference.over(windows, batch_size)
        self._current: ReferenceWindow | None = None
        self._kl = torch.empty(shape)
        self._agrees, self._lost, self._gained = (torch.empty(shape, dtype=torch.bool) for _ in range(3))
        self._reference_nll = NllMeasure(windows, "the reference")

    def add(self, window: int, part: slice, log_q: Tensor, targets: Tensor) -> None:
        """Compare some positions of a window."""
        if self._current is None:
            self._current = next(self._passes)
        kl, top, nll = self._current.compare(part, log_q, targets)
        ours = log_q.argmax(-1)
        self._kl[window, part] = kl.cpu()
        self._agrees[window, part] = (ours == top).cpu()
        self._lost[window, part] = ((top == targets) & (ours != targets)).cpu()
        self._gained[window, part] = ((ours == targets) & (top != targets)).cpu()
        self._reference_nll.put(window, part, nll)

    def end_window(self, window: int) -> None:
        """Let go of the reference's window."""
        self._reference_nll.end_window(window)
        self._current = None
        if window + 1 == len(self.windows):
            self._passes.close()

    def result(self, model: Perplexity, *, seed: int = 0) -> Divergence:
        """The figures; `model` is the perplexity from the same pass."""
        kl_all = self._kl.numpy().reshape(-1)
        kl = self.windows.cluster_means(self._kl)
        agreement = self.windows.cluster_means(self._agrees.float())
        lost, gained = (float(side.double().mean()) for side in (self._lost, self._gained))
        of_reference = self._reference_nll.result(self.reference.described, batch_size=self.batch_size, seed=seed)
        return Divergence(
            kl=float(kl_all.mean(dtype=np.float64)),
            kl_interval=kl.interval(seed=seed),
            kl_median=float(np.quantile(kl_all, 0.5, method="inverted_cdf")),
            kl_p99=float(np.quantile(kl_all, 0.99, method="inverted_cdf")),
            kl_max=float(kl_all.max()),
            agreement=float(self._agrees.double().mean()),
            agreement_interval=agreement.interval(seed=seed),
            flips=lost + gained,
            lost=lost,
            gained=gained,
            kl_clusters=kl,
            agreement_clusters=agreement,
            record_loss=self.reference.loss(),
            difference=paired_difference(model, of_reference, seed=seed),
            model=model,
            reference=of_reference,
            tokens=kl_all.size,
            settings={**model.settings, "definition": DEFINITION},
        )


def compare_divergences(first: Divergence, second: Divergence, *, seed: int = 0) -> tuple[Comparison, ...]:
    """Compare two variants of one original on the same windows: perplexity, mean KL, agreement.

    Raises `EvalError` if the windows were not the same.
    """
    return (
        compare_perplexities(first.model, second.model, seed=seed),
        compare(first.kl_clusters, second.kl_clusters, "KL divergence", seed=seed),
        compare(
            first.agreement_clusters,
            second.agreement_clusters,
            "top-1 agreement",
            higher_is_better=True,
            seed=seed,
        ),
    )
