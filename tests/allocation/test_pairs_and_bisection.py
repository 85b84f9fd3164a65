"""Pairs on a quadratic loss, where the truth is known; and the bisection against a linear scan."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.allocation import bisection, knapsack, quadratic
from quantlab.allocation.budget import parse_budget
from quantlab.allocation.choices import Choices, InfeasibleError
from quantlab.allocation.pairwise import pair_terms, scaled
from quantlab.errors import RecipeError
from quantlab.planning import prepare_planning


class Quadratic:
    """``1/2 d^T H d`` of layers' errors: H couples them."""

    def __init__(self, sizes, seed, coupled=True):
        rng = np.random.default_rng(seed)
        total = sum(sizes)
        root = rng.normal(size=(total, total))
        self.ends = np.cumsum([0, *sizes])
        self.hessian = root @ root.T / total
        if not coupled:
            mask = np.zeros_like(self.hessian)
            for a, b in zip(self.ends, self.ends[1:], strict=False):
                mask[a:b, a:b] = 1
            self.hessian *= mask
        self.errors = [rng.normal(size=size) for size in sizes]

    def block(self, i, j):
        return self.hessian[self.ends[i] : self.ends[i + 1], self.ends[j] : self.ends[j + 1]]

    def loss(self, changed):
        d = np.zeros(self.ends[-1])
        for i in changed:
            d[self.ends[i] : self.ends[i + 1]] = self.errors[i]
        return 0.5 * d @ self.hessian @ d + 3.0


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.integers(0, 99))
def test_pairs_equal_the_analytic_blocks(sizes, seed):
    toy = Quadratic(sizes, seed)
    pairs = [(i, j) for i in range(len(sizes)) for j in range(i + 1, len(sizes))]
    for (i, j), term in pair_terms(toy.loss, pairs).items():
        assert term == pytest.approx(toy.errors[i] @ toy.block(i, j) @ toy.errors[j], abs=1e-9)


def test_terms_of_other_candidates_follow_the_sizes_of_errors():
    """Candidates that leave the same error in other sizes: exact."""
    toy = Quadratic([4, 6], 1)
    sizes = np.array([1.0, 0.5, 0.1])
    own = [0.5 * toy.errors[i] @ toy.block(i, i) @ toy.errors[i] * sizes**2 for i in (0, 1)]
    term = pair_terms(toy.loss, [(0, 1)])[0, 1]
    expected = np.outer(sizes, sizes) * (toy.errors[0] @ toy.block(0, 1) @ toy.errors[1])
    np.testing.assert_allclose(scaled(term, own[0], own[1], 0), expected)
    middle = sizes[1] ** 2 * term
    np.testing.assert_allclose(scaled(middle, own[0], own[1], 1), expected)


def choices_of(toy):
    """Each item may be quantized, for nothing, or stay, for 1."""
    n = len(toy.errors)
    own = [toy.loss([i]) - toy.loss([]) for i in range(n)]
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    terms = {pair: np.array([[term, 0], [0, 0]]) for pair, term in pair_terms(toy.loss, pairs).items()}
    return Choices(np.array([[loss, 0.0] for loss in own]), np.array([[0.0, 1.0]] * n), terms)


def test_without_coupling_the_augmented_order_is_the_diagonal_one():
    choices = choices_of(Quadratic([3] * 6, 5, coupled=False))
    augmented = quadratic.augmented(choices)
    assert list(np.argsort(augmented.losses[:, 0])) == list(np.argsort(choices.losses[:, 0]))


def test_where_layers_are_coupled_the_augmented_order_is_right_and_the_diagonal_one_wrong():
    toy = Quadratic([1, 1, 1], 0)
    toy.hessian = np.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.3]])
    toy.errors = [np.array([1.0])] * 3
    choices = choices_of(toy)
    truth = min(((0, 1), (0, 2), (1, 2)), key=toy.loss)  # two of the three are to be quantized
    diagonal = knapsack.solve(Choices(choices.losses, choices.costs), 1)
    assert tuple(i for i, option in enumerate(diagonal) if option == 0) == (0, 1) != truth
    for solve in (quadratic.solve, quadratic.search):
        found = solve(choices, 1)
        assert toy.loss([i for i, option in enumerate(found) if option == 0]) == pytest.approx(toy.loss(truth))
    first = np.argsort(quadratic.augmented(choices).losses[:, 0])[0]
    assert first == 2, "the item that harms nobody else comes first"
    assert np.argsort(choices.losses[:, 0])[0] != 2


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300), st.floats(0, 1))
def test_bisection_is_a_linear_scan_in_fewer_evaluations(count, share):
    threshold, asked = int(share * count), []
    found = bisection.largest(count, lambda k: asked.append(k) or k <= threshold)
    assert found == threshold
    assert len(asked) <= math.ceil(math.log2(count + 1))


def test_the_search_descends_and_keeps_the_tolerance():
    rng = np.random.default_rng(0)
    weights = rng.lognormal(0, 1, 30)
    losses = weights[:, None] * np.array([1.0, 0.25, 0.06])
    choices = Choices(losses, np.array([[2.0, 3.0, 4.0]] * 30))
    evaluations = []

    def holds(chosen):
        evaluations.append(chosen)
        return choices.loss(chosen) <= 12

    chosen = bisection.search(choices, holds)
    assert choices.loss(chosen) <= 12
    assert choices.cost(chosen) <= 1.1 * choices.cost(knapsack.solve(choices.swapped(), 12))
    assert len(evaluations) <= 2 * 5 + 2
    with pytest.raises(InfeasibleError, match="finest"):
        bisection.search(choices, lambda _chosen: False)


def test_repair_where_the_measure_is_not_monotone():
    """It holds by chance at the choice that the bisection asked for, and not at the end: items are put back."""
    choices = Choices(np.array([[3.0, 1.0], [5.0, 1.0], [4.0, 1.0]]), np.array([[1.0, 2.0]] * 3))
    assert bisection.repair(choices, (0, 0, 0), [1, 0], lambda c: list(c).count(1) >= 2) == (0, 1, 1)
    with pytest.raises(InfeasibleError):
        bisection.repair(choices, (0, 0, 0), [1, 0], lambda _c: False)


def test_pairs_of_a_model_are_measured_and_planned_with(model, tokens, tmp_path):
    planning = prepare_planning(
        model,
        recipe={"granularity": 32, "quantizer": "gptq"},
        calibration=tokens,
        cache=tmp_path,
        candidates="formats=int2,int3,int4",
        sensitivity="pairwise",
        options={"pairs": "block"},
    )
    found, _ = planning.measured()
    assert len(found.pairs) == 4 * 6
    plan = planning.solve(parse_budget(3.4))
    assert plan.loss == pytest.approx(sum(item.got.loss for item in plan.items) + plan.pair_loss)
    assert plan.pair_loss != 0
    alone = planning.solve(parse_budget(3.4), "knapsack")
    assert plan.loss <= alone.loss + 1e-12
    again, cached = planning.measured()
    assert cached
    assert again == found


def test_a_measured_tolerance_is_kept(plan):
    """The bisection's own figure is below the tolerance, and close to what the prediction of such a plan is."""
    found = plan("loss=0.05", solver="bisection", candidates="formats=int2,int4,int8")
    assert found.measured <= 0.05
    assert found.code_bits < 8
    assert 0.4 < found.measured / found.loss < 2.5
    assert any("evaluations" in note for note in found.notes)
    strict = plan("loss=0.001", solver="bisection", candidates="formats=int2,int4,int8")
    assert strict.bytes > found.bytes
    assert strict.measured <= 0.001
    with pytest.raises(RecipeError, match="measures"):
        plan(4.0, solver="bisection")
