"""The target that reproduces the original model's output, against least squares in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from gptq_problems import (
    COLUMNS,
    SCHEMES,
    W,
    X,
    each_order,
    each_scheme,
    solve,
)
from synthetic import (
    array,
    inputs,
    quadratic,
    statistics,
)

from quantlab.problem import Solution
from quantlab.recipe import Scheme

ORIGINAL = X + 0.4 * inputs(400, COLUMNS, seed=2)
FINE = Scheme(format="int8", granularity="channel", scale_dtype="float32")


def shifted_target(asym: float, damping: float) -> np.ndarray:
    """``W + asym (W* - W)`` with ``W* = W (C + lambda I) (H + lambda I)^-1``, C = E[x_o x^T]."""
    w, x, original = array(W), array(X), array(ORIGINAL)
    h, c = x.T @ x / len(x), original.T @ x / len(x)
    eye = damping * np.diag(h).mean() * np.eye(COLUMNS)
    return w + asym * (w @ (c + eye) @ np.linalg.inv(h + eye) - w)


@each_order
@each_scheme
def test_without_a_shift_the_target_is_the_weight(order, scheme):
    plain = solve(scheme=scheme, order=order)
    for original, asym in ((X, 1.0), (ORIGINAL, 0.0)):
        solution = solve(x=statistics(X, original), scheme=scheme, order=order, asym=asym)
        assert torch.equal(solution.qtensor.codes, plain.qtensor.codes)
        assert torch.equal(solution.loss, plain.loss)


@each_order
@pytest.mark.parametrize("asym", [0.3, 1.0])
@pytest.mark.parametrize("damping", [1e-4, 0.05])
def test_the_shifted_target(order, asym, damping):
    """Eight bits stay near it, and the loss is measured against it: both say where it is."""
    kept = statistics(X, ORIGINAL)
    solution = solve(x=kept, scheme=FINE, order=order, asym=asym, damping=damping)
    target = shifted_target(asym, damping)
    assert np.abs(target - array(W)).max() > 5 * float(solution.qtensor.scales.abs().mean())
    error = target - array(solution.qtensor.dequantize())
    expected = quadratic(error, array(kept.second_moment))
    np.testing.assert_allclose(array(solution.loss), expected, rtol=0.02)
    assert np.linalg.norm(error @ X.double().numpy().T) < 0.01 * np.linalg.norm(target @ X.double().numpy().T)


def test_with_little_damping_the_target_is_the_least_squares_solution():
    best = np.linalg.lstsq(array(X), array(ORIGINAL) @ array(W).T, rcond=None)[0].T
    np.testing.assert_allclose(shifted_target(1.0, 1e-9), best, atol=1e-5)
    solution = solve(x=statistics(X, ORIGINAL), scheme=FINE, asym=1.0, damping=1e-5)
    reached = array(X) @ array(solution.qtensor.dequantize()).T - array(ORIGINAL) @ array(W).T
    least = array(X) @ best.T - array(ORIGINAL) @ array(W).T
    assert np.square(reached).sum() < 1.001 * np.square(least).sum()


def test_an_input_that_only_the_original_model_has_on_still_counts():
    """Its own weights can do nothing, but the others can stand in for them."""
    x = X.clone()
    x[:, 5] = 0
    goal = array(ORIGINAL) @ array(W).T
    least = np.linalg.lstsq(array(x), goal, rcond=None)[0]
    q = solve(x=statistics(x, ORIGINAL), scheme=FINE, asym=1.0, damping=1e-4).qtensor
    reached = np.square(array(x) @ array(q.dequantize()).T - goal).sum()
    assert reached < 1.001 * np.square(array(x) @ least - goal).sum()


@each_order
@pytest.mark.parametrize(
    "scheme",
    [SCHEMES["grouped"], SCHEMES["asymmetric"], SCHEMES["table"]],
    ids=["grouped", "asymmetric", "table"],
)
def test_the_shift_brings_the_original_output_closer(order, scheme):
    """The error above what no weight could avoid, on the calibration inputs."""
    goal = array(ORIGINAL) @ array(W).T
    least = np.linalg.lstsq(array(X), goal, rcond=None)[1].sum()

    def miss(asym: float) -> float:
        q = solve(x=statistics(X, ORIGINAL), scheme=scheme, order=order, asym=asym).qtensor
        return np.square(array(X) @ array(q.dequantize()).T - goal).sum() - least

    assert miss(1.0) < 0.5 * miss(0.0)
    assert miss(1.0) < miss(0.5) < miss(0.0)


@each_order
def test_the_step_goes_as_far_as_held_out_sequences_agree(order):
    """Held-out sequences that say ``c`` times the same scale the step by ``c``, from nothing to all of it."""
    kept = statistics(X, ORIGINAL)

    def held_out(times: float) -> Solution:
        more = dataclasses.replace(kept, held_out_shift=times * kept.shift)
        return solve(x=more, scheme=FINE, order=order, asym=1.0)

    for times, asym in ((1.0, 1.0), (0.5, 0.5), (3.0, 1.0), (-1.0, 0.0)):
        expected = solve(x=kept, scheme=FINE, order=order, asym=asym)
        difference = held_out(times).qtensor.dequantize() - expected.qtensor.dequantize()
        # A number at a tie may fall on the other side; a step of another length moves everything.
        assert (difference.abs() > 1e-5).float().mean() < 0.05
