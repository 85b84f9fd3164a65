"""How well a model's confidence matches how often it is right: on tokens, and on multiple-choice questions.

Which binning is used changes conclusions (arXiv:2308.11838), so there are several, and one measure without bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.polynomial import Chebyshev, chebyshev
from numpy.typing import NDArray
from torch import Tensor, nn

from .errors import EvalError
from .logits import Progress, run_measures
from .perplexity import token_nll
from .windows import Windows

BINS = (5, 10, 15, 25)
CLASSWISE_BINS = RELIABILITY_BINS = 15

_LOG_LIMIT = math.log(5)
_NODES = 17
_VOCABULARY = 1024
_STRIDE = 8

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ReliabilityBin:
    """One of 15 bins of equal width: how many predictions fell into it, how sure they were, how often right."""

    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Confidence (the largest probability) against being right (that class being the true one), 0 to 1.

    Attributes:
        count: predictions.
        accuracy: share that is right.
        confidence: mean confidence; above `accuracy` the model is overconfident.
        ece: expected calibration error by the number of bins of equal width (arXiv:1706.04599): the mean of
            |accuracy - confidence| over bins, weighted by what is in them.
        ece_equal_mass: the same with bins that hold equally many predictions.
        mce: the largest gap of a bin, by the number of bins of equal width.
        classwise_ece: the same error of each class's own probability, 15 bins, mean over all classes
            (arXiv:1904.01685). With a vocabulary for classes it is small by construction: compare, don't interpret.
        ks_error: the largest difference of the cumulative sums of confidence and being right, in the order of
            confidence (arXiv:2006.12800); no bins.
        brier: mean of sum over classes of (probability - truth) squared, 0 to 2.
        nll: mean negative log-likelihood of the truth in nats.
        temperature: what makes the likelihood of the first half largest when logits are divided by it; above
            1 the model is overconfident. None where there are too few predictions for two halves.
        ece_unscaled: `ece` of the second half alone.
        ece_scaled: the same with logits divided by `temperature`: what rescaling does not repair.
        reliability: the bins of a reliability diagram.
    """

    count: int
    accuracy: float
    confidence: float
    ece: Mapping[int, float]
    ece_equal_mass: Mapping[int, float]
    mce: Mapping[int, float]
    classwise_ece: float
    ks_error: float
    brier: float
    nll: float
    temperature: float | None
    ece_unscaled: Mapping[int, float] | None
    ece_scaled: Mapping[int, float] | None
    reliability: tuple[ReliabilityBin, ...]


def calibration(probabilities: Tensor, truth: Tensor) -> Calibration:
    """Measure predictions given as probabilities `[n, classes]`, with the true classes `[n]`.

    Rows that have fewer classes are filled up with zeros. The temperature is fitted on the rows of even number
    and judged on the others. Raises `EvalError` if a row is not a distribution or a class is not in range.
    """
    if probabilities.ndim != 2 or len(probabilities) != len(truth) or len(truth) == 0:
        raise EvalError(
            f"probabilities of shape {tuple(probabilities.shape)} and {len(truth)} true classes; "
            "give [n, classes] and [n]"
        )
    p = probabilities.double()
    wrong = ((p < 0).any(-1) | ((p.sum(-1) - 1).abs() > 1e-3) | p.isnan().any(-1)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise EvalError(f"row {row} of the probabilities is not a distribution, its sum is {float(p[row].sum()):.4g}")
    if not ((truth >= 0) & (truth < p.shape[1])).all():
        raise EvalError(f"a true class is not within 0 to {p.shape[1] - 1}")
    halves = min(2, len(p))
    measure = CalibrationMeasure(halves)
    for half in range(halves):
        measure.add(half, slice(0, len(p)), p[half::halves].log(), truth[half::halves])
    return measure.result()


def token_calibration(
    model: nn.Module, windows: Windows, *, batch_size: int = 1, progress: Progress | None = None
) -> Calibration:
    """Measure the confidence of a causal language model's next-token predictions.

    The temperature is fitted on the first half of the windows and judged on the second. Raises `EvalError` as
    `perplexity` does.
    """
    measure = CalibrationMeasure(len(windows))
    run_measures(model, windows, [measure], batch_size=batch_size, progress=progress)
    return measure.result()


class CalibrationMeasure:
    """Takes predictions as they come. What is kept is two numbers of each, and 15 of each class."""

    def __init__(self, windows: int) -> None:
        self._fitted = windows // 2
        self._fit = _TemperatureFit()
        self._confidence: list[Floats] = []
        self._right: list[Floats] = []
        self._scaled: list[Floats] = []
        self._in_second = 0
        self._squares = self._nll = 0.0
        self._gaps: Tensor | None = None

    def add(self, window: int, part: slice, log_q: Tensor, targets: Tensor) -> None:  # noqa: ARG002
        """Take some predictions: log-probabilities `[n, classes]` and the truth `[n]`."""
        p = log_q.exp()
        confidence, top = p.max(-1)
        self._confidence.append(_array(confidence))
        self._right.append(_array(top == targets))
        of_truth = p.gather(-1, targets[:, None]).squeeze(-1)
        squares = torch.linalg.vector_norm(p, dim=-1).double().square()
        self._squares += float((squares - 2 * of_truth.double() + 1).sum())
        self._nll += float(token_nll(log_q, targets).double().sum())
        self._add_gaps(p, of_truth, targets)
        if window < self._fitted:
            self._fit.add(log_q, targets)
        elif (inverse := self._fit.inverse()) is not None:
            scaled = inverse * confidence.log() - _log_sum_of_powers(log_q, inverse, p)
            self._scaled.append(_array(scaled.exp()))
            self._in_second += len(targets)

    def end_window(self, window: int) -> None:
        """Nothing is left to do."""

    def _add_gaps(self, p: Tensor, of_truth: Tensor, targets: Tensor) -> None:
        """Sum of probability minus truth, by class and bin of the probability."""
        if self._gaps is None:
            self._gaps = torch.zeros(p.shape[1], CLASSWISE_BINS, dtype=torch.float64, device=p.device)
        self._gaps[:, 0] += p.sum(0)
        # Few probabilities are beyond the first bin: those are moved, instead of each being sorted into one.
        rows, classes = (p > 0.999 / CLASSWISE_BINS).nonzero(as_tuple=True)
        moved = p[rows, classes].double()
        self._gaps.index_put_((classes, torch.zeros_like(classes)), -moved, accumulate=True)
        self._gaps.index_put_((classes, _bin_of(p[rows, classes], CLASSWISE_BINS)), moved, accumulate=True)
        truth = -torch.ones_like(of_truth, dtype=torch.float64)
        self._gaps.index_put_((targets, _bin_of(of_truth, CLASSWISE_BINS)), truth, accumulate=True)

    def result(self) -> Calibration:
        """The figures of all that was added."""
        confidence, right = np.concatenate(self._confidence), np.concatenate(self._right)
        count = len(right)
        inverse = self._fit.inverse() if self._scaled else None
        assert self._gaps is not None
        second = right[count - self._in_second :]
        return Calibration(
            count=count,
            accuracy=float(right.mean()),
            confidence=float(confidence.mean()),
            ece=_errors(confidence, right),
            ece_equal_mass={bins: _equal_mass_error(confidence, right, bins) for bins in BINS},
            mce={bins: _largest_gap(confidence, right, bins) for bins in BINS},
            classwise_ece=float(self._gaps.abs().sum(-1).mean()) / count,
            ks_error=_ks_error(confidence, right),
            brier=self._squares / count,
            nll=self._nll / count,
            temperature=None if inverse is None else 1 / inverse,
            ece_unscaled=None if inverse is None else _errors(confidence[count - self._in_second :], second),
            ece_scaled=None if inverse is None else _errors(np.concatenate(self._scaled), second),
            reliability=_reliability(confidence, right),
        )


class _TemperatureFit:
    """The temperature of the largest likelihood, found in one pass.

    Negative log-likelihood is smooth in the logarithm of the inverse temperature, so its sums at a few nodes
    give it everywhere (Chebyshev interpolation). Of tokens every `_STRIDE`-th is taken: they are many, and large.
    """

    def __init__(self) -> None:
        self._nodes = chebyshev.chebpts1(_NODES) * _LOG_LIMIT
        self._sums = np.zeros(_NODES)
        self._count = 0
        self._inverse: float | None = None

    def add(self, log_q: Tensor, targets: Tensor) -> None:
        stride = _STRIDE if log_q.shape[1] >= _VOCABULARY else 1
        log_q, targets = log_q[::stride], targets[::stride]
        self._count += len(targets)
        of_truth, buffer = token_nll(log_q, targets), torch.empty_like(log_q)
        for index, node in enumerate(self._nodes):
            inverse = math.exp(node)
            nll = inverse * of_truth + _log_sum_of_powers(log_q, inverse, buffer)
            self._sums[index] += float(nll.double().sum())

    def inverse(self) -> float | None:
        """One over the temperature; None without data, or where a truth was ruled out."""
        if self._inverse is None and self._count and np.isfinite(self._sums).all():
            fitted = chebyshev.chebfit(self._nodes / _LOG_LIMIT, self._sums / self._count, _NODES - 1)
            curve = Chebyshev(fitted, domain=[-_LOG_LIMIT, _LOG_LIMIT])
            roots = curve.deriv().roots()
            inside = [root.real for root in roots if abs(root.imag) < 1e-9 and abs(root.real) < _LOG_LIMIT]
            self._inverse = math.exp(min([*inside, -_LOG_LIMIT, _LOG_LIMIT], key=curve))
        return self._inverse


def _log_sum_of_powers(log_q: Tensor, power: float, buffer: Tensor) -> Tensor:
    """log of the sum of `q^power` of each row; `buffer` is overwritten, as large results in new memory are slow.

    The largest of v probabilities is at least 1 / v, so with a power of 5 or less nothing underflows.
    """
    return torch.mul(log_q, power, out=buffer).exp_().sum(-1).log()


def _array(values: Tensor) -> Floats:
    return values.double().cpu().numpy()


def _bin_of(p: Tensor, bins: int) -> Tensor:
    return ((p * bins).ceil().long() - 1).clamp(0, bins - 1)


def _binned(confidence: Floats, right: Floats, bins: int) -> tuple[Floats, Floats, Floats]:
    """Of each bin of equal width, closed above: how many, their confidences' sum, how many right."""
    index = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    columns = (np.ones_like(confidence), confidence, right)
    counts, sums, hits = (np.bincount(index, column, bins).astype(np.float64) for column in columns)
    return counts, sums, hits


def _errors(confidence: Floats, right: Floats) -> dict[int, float]:
    """The expected calibration error by number of bins."""
    gaps = {bins: np.subtract(*_binned(confidence, right, bins)[1:]) for bins in BINS}
    return {bins: float(np.abs(gap).sum() / len(right)) for bins, gap in gaps.items()}


def _largest_gap(confidence: Floats, right: Floats, bins: int) -> float:
    counts, sums, hits = _binned(confidence, right, bins)
    full = counts > 0
    return float((np.abs(sums - hits)[full] / counts[full]).max())


def _reliability(confidence: Floats, right: Floats) -> tuple[ReliabilityBin, ...]:
    return tuple(
        ReliabilityBin(int(count), float(total / count), float(hit / count)) if count else ReliabilityBin(0, 0.0, 0.0)
        for count, total, hit in zip(*_binned(confidence, right, RELIABILITY_BINS), strict=True)
    )


def _sorted(confidence: Floats, right: Floats) -> tuple[Floats, Floats]:
    """By confidence. Of equally confident predictions each is as right as they are on average: order has no say."""
    values, group = np.unique(confidence, return_inverse=True)
    sizes = np.bincount(group)
    shares = np.bincount(group, weights=right) / sizes
    return np.repeat(values, sizes), np.repeat(shares, sizes)


def _equal_mass_error(confidence: Floats, right: Floats, bins: int) -> float:
    gap = np.subtract(*_sorted(confidence, right))
    return float(sum(abs(part.sum()) for part in np.array_split(gap, bins)) / len(gap))


def _ks_error(confidence: Floats, right: Floats) -> float:
    gap = np.subtract(*_sorted(confidence, right))
    return float(np.abs(np.cumsum(gap)).max() / len(gap))
