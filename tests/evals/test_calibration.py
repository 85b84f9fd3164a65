"""Against naive references that are written from the definitions, and the properties that follow from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantlab_evals import EvalError, calibration, token_calibration
from quantlab_evals.calibration import BINS, CalibrationMeasure
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax


def predictions(seed, count=200, classes=5, sharpness=2.0):
    rng = np.random.default_rng(seed)
    p = np.exp(log_softmax(sharpness * rng.normal(size=(count, classes)), axis=-1))
    truth = np.array([rng.choice(classes, p=row) for row in p])
    return p, truth


def measured(p, truth):
    return calibration(torch.tensor(p), torch.tensor(truth))


def naive_errors(confidence, right, bins):
    """ECE and MCE, one bin after another."""
    total, worst = 0.0, 0.0
    for b in range(bins):
        inside = [i for i, c in enumerate(confidence) if b / bins < c <= (b + 1) / bins]
        if inside:
            gap = abs(np.mean([right[i] for i in inside]) - np.mean([confidence[i] for i in inside]))
            total += len(inside) / len(confidence) * gap
            worst = max(worst, gap)
    return total, worst


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 60), st.integers(2, 6), st.floats(0.2, 4))
def test_equals_the_definitions(seed, count, classes, sharpness):
    p, truth = predictions(seed, count, classes, sharpness)
    found = measured(p, truth)
    confidence, right = p.max(-1), p.argmax(-1) == truth
    for bins in BINS:
        ece, mce = naive_errors(confidence, right, bins)
        assert found.ece[bins] == pytest.approx(ece, abs=1e-9)
        assert found.mce[bins] == pytest.approx(mce, abs=1e-9)
        order = np.argsort(confidence)
        parts = [part for part in np.array_split(order, bins) if len(part)]
        mass = sum(len(part) / count * abs(right[part].mean() - confidence[part].mean()) for part in parts)
        assert found.ece_equal_mass[bins] == pytest.approx(mass, abs=1e-9)
    onehot = np.eye(classes)[truth]
    each = [naive_errors(p[:, k], onehot[:, k], 15)[0] for k in range(classes)]
    assert found.classwise_ece == pytest.approx(np.mean(each), abs=1e-9)
    cumulative = [
        abs(sum(right[i] - confidence[i] for i in range(count) if confidence[i] <= c)) / count for c in confidence
    ]
    assert found.ks_error == pytest.approx(max(cumulative), abs=1e-9)
    assert found.brier == pytest.approx(((p - onehot) ** 2).sum(-1).mean())
    assert found.nll == pytest.approx(-np.log(p[range(count), truth]).mean())
    assert (found.accuracy, found.confidence) == pytest.approx((right.mean(), confidence.mean()))
    assert found.ks_error <= sum(abs(right - confidence)) / count + 1e-12
    assert sum(entry.count for entry in found.reliability) == count


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
def test_temperature_is_that_of_the_largest_likelihood_on_the_first_half(sharpness):
    p, truth = predictions(1, 600, 6, 1.5)
    p = np.exp(log_softmax(sharpness * np.log(p), axis=-1))
    found = measured(p, truth)

    def nll(log_t):
        scaled = log_softmax(np.log(p[::2]) / math.exp(log_t), axis=-1)
        return -scaled[range(300), truth[::2]].mean()

    best = minimize_scalar(nll, bounds=(-1.6, 1.6), method="bounded")
    assert found.temperature == pytest.approx(math.exp(best.x), rel=1e-3)
    assert found.temperature == pytest.approx(sharpness, rel=0.25)
    scaled = np.exp(log_softmax(np.log(p[1::2]) / found.temperature, axis=-1))
    right = p[1::2].argmax(-1) == truth[1::2]
    for bins in BINS:
        assert found.ece_scaled[bins] == pytest.approx(naive_errors(scaled.max(-1), right, bins)[0], abs=1e-9)
        assert found.ece_unscaled[bins] == pytest.approx(naive_errors(p[1::2].max(-1), right, bins)[0], abs=1e-9)
    if sharpness != 1:
        assert found.ece_scaled[15] < 0.6 * found.ece_unscaled[15]


def test_a_calibrated_model_has_an_error_that_shrinks_as_one_over_root_n():
    errors = []
    for count in (500, 8000, 128000):
        found = measured(*predictions(0, count, 4, 1.0))
        errors.append(found.ece[10])
        assert found.ece[10] < 4 / math.sqrt(count)
        assert found.ks_error < 2 / math.sqrt(count)
        assert found.temperature == pytest.approx(1, abs=20 / math.sqrt(count))
    assert errors[0] > errors[1] > errors[2]


def test_a_constant_predictor_errs_by_accuracy_minus_confidence_in_any_order():
    p = torch.tensor([[0.7, 0.3]]).repeat(1000, 1)
    truth = torch.cat([torch.zeros(550), torch.ones(450)]).long()
    for order in (torch.arange(1000), torch.randperm(1000, generator=torch.Generator().manual_seed(0))):
        found = calibration(p, truth[order])
        expected = pytest.approx(0.15, abs=1e-6)
        assert found.ks_error == expected
        for bins in BINS:
            assert (found.ece[bins], found.ece_equal_mass[bins], found.mce[bins]) == (expected,) * 3


def test_order_has_no_say_in_what_has_no_halves():
    p, truth = predictions(4)
    order = np.random.default_rng(0).permutation(len(p))
    one, other = measured(p, truth), measured(p[order], truth[order])
    for name in ("ece", "ece_equal_mass", "mce", "ks_error", "brier", "nll", "classwise_ece"):
        assert getattr(one, name) == pytest.approx(getattr(other, name)), name


def test_tokens_are_measured_like_anything_else(make_model, make_windows):
    model, windows = make_model(), make_windows(count=8)
    with torch.no_grad():
        log_q = model(windows.tokens).logits[:, :-1].log_softmax(-1)
    found = token_calibration(model, windows, batch_size=3)
    p, truth = log_q.exp().double().flatten(0, 1), windows.tokens[:, 1:].flatten()
    expected = calibration(p / p.sum(-1, keepdim=True), truth)
    for name in ("ece", "ece_equal_mass", "mce", "ks_error", "brier", "nll", "classwise_ece", "accuracy"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-6), name
    assert found.temperature > 1.5, "random weights are sure of themselves without a reason"
    assert found.ece_scaled[15] < found.ece_unscaled[15]
    assert token_calibration(model, make_windows(count=1)).temperature is None


def test_what_is_kept_does_not_grow_with_the_vocabulary():
    measure = CalibrationMeasure(4)
    for window in range(4):
        measure.add(window, slice(0, 64), torch.randn(64, 5000).log_softmax(-1), torch.randint(5000, (64,)))
    kept = sum(len(part) for parts in (measure._confidence, measure._right, measure._scaled) for part in parts)
    assert kept == 64 * (4 + 4 + 2)
    assert measure._gaps.shape == (5000, 15)


def test_an_impossible_truth_leaves_no_temperature():
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0], [0.5, 0.5]])
    found = calibration(p, torch.tensor([1, 0, 0, 1]))
    assert found.nll == math.inf
    assert found.temperature is None
    assert found.ece_scaled is None


@pytest.mark.parametrize(
    ("p", "truth", "words"),
    [
        ([[0.5, 0.4]], [0], "row 0 of the probabilities is not a distribution, its sum is 0.9"),
        ([[0.5, 0.5], [1.5, -0.5]], [0, 0], "row 1"),
        ([[0.5, 0.5]], [2], "not within 0 to 1"),
        ([[0.5, 0.5]], [0, 1], "give \\[n, classes\\]"),
    ],
)
def test_bad_input_is_refused(p, truth, words):
    with pytest.raises(EvalError, match=words):
        calibration(torch.tensor(p), torch.tensor(truth))
