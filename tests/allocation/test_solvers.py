"""Solvers against brute force, against each other, and what holds of any: monotony, duplicates, infeasible budgets."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.allocation import knapsack, milp, quadratic
from quantlab.allocation.choices import Choices, InfeasibleError


def brute_force(choices: Choices, budget: float) -> float:
    """The least loss, by trying every choice."""
    items, options = choices.losses.shape
    every = product(range(options), repeat=items)
    return min((choices.loss(chosen) for chosen in every if choices.cost(chosen) <= budget), default=np.inf)


@st.composite
def problems(draw, items=5, options=4, pairs=False):
    n, k = draw(st.integers(1, items)), draw(st.integers(1, options))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    losses, costs = rng.exponential(size=(n, k)), rng.integers(1, 40, (n, k)).astype(float)
    if draw(st.booleans()):  # as formats are: more bytes, less loss
        losses, costs = -np.sort(-losses, axis=1), np.sort(costs, axis=1)
    if k > 1 and draw(st.booleans()):
        losses[rng.integers(n), rng.integers(k)] = np.inf
    terms = {}
    if pairs:
        terms = {(i, j): rng.normal(size=(k, k)) for i in range(n) for j in range(i + 1, n) if rng.random() < 0.6}
    choices = Choices(losses, costs, terms)
    budget = choices.cheapest() + draw(st.floats(0, 1)) * (costs.max(1).sum() - choices.cheapest())
    return choices, float(budget)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_knapsack_equals_brute_force(problem):
    choices, budget = problem
    chosen = knapsack.solve(choices, budget)
    assert choices.cost(chosen) <= budget * (1 + 1e-9)
    assert choices.loss(chosen) == pytest.approx(brute_force(choices, budget * (1 + 1e-12)))


@settings(max_examples=40, deadline=None)
@given(problems(items=4, options=3))
def test_milp_equals_the_knapsack(problem):
    choices, budget = problem
    chosen = milp.solve(choices, budget)
    assert choices.loss(chosen) == pytest.approx(choices.loss(knapsack.solve(choices, budget)))


@settings(max_examples=25, deadline=None)
@given(problems(items=4, options=3, pairs=True))
def test_quadratic_equals_brute_force(problem):
    choices, budget = problem
    best = brute_force(choices, budget * (1 + 1e-12))
    assert choices.loss(milp.solve(choices, budget)) == pytest.approx(best)
    chosen = quadratic.solve(choices, budget)
    assert choices.cost(chosen) <= budget * (1 + 1e-9)
    assert choices.loss(chosen) == pytest.approx(best)


def formats(items=120, seed=0):
    """A problem of the size and shape of a model's."""
    rng = np.random.default_rng(seed)
    weights = rng.choice([331776, 552960, 884736, 1769472], items)
    bits = np.array([2, 3, 4, 5, 6, 8])
    losses = rng.lognormal(0, 1.5, items)[:, None] * 4.0 ** -(bits - 2.0) * rng.lognormal(0, 0.2, (items, 6))
    return Choices(losses, weights[:, None] * bits / 8 + 4 * 2**bits + rng.integers(0, 9, items)[:, None])


def at(choices: Choices, bits: float) -> float:
    return float(choices.costs[:, 1].sum() + (choices.costs[:, 2] - choices.costs[:, 1]).sum() * (bits - 3))


@pytest.mark.parametrize("bits", [2.2, 3.0, 3.5, 4.0, 5.9])
def test_a_model_s_size(bits):
    choices = formats()
    found, exact = knapsack.solve(choices, at(choices, bits)), milp.solve(choices, at(choices, bits))
    assert choices.loss(found) <= choices.loss(exact) * (1 + 1e-9)
    assert choices.loss(found) == pytest.approx(choices.loss(exact), rel=1e-6)


def test_larger_budgets_never_hurt():
    choices = formats(40, seed=1)
    losses = [choices.loss(knapsack.solve(choices, at(choices, bits))) for bits in np.linspace(2.1, 6, 60)]
    assert all(later <= earlier for earlier, later in pairwise(losses))


def test_everything_that_is_best_when_the_budget_is_no_limit():
    choices = formats(30)
    assert set(knapsack.solve(choices, 1e18)) == {5}


def test_the_reverse_finds_the_same_front():
    """The least cost within a loss, for the loss that a budget led to, is that cost."""
    choices = formats(25, seed=2)
    for bits in (2.7, 3.3, 4.1):
        there = knapsack.solve(choices, at(choices, bits))
        back = knapsack.solve(choices.swapped(), choices.loss(there) * (1 + 1e-12))
        assert choices.cost(back) == pytest.approx(choices.cost(there))


def test_a_reference_as_the_budget_is_never_worse():
    """L-GreCo's form: the error of a uniform recipe is the budget, which that recipe itself keeps."""
    choices = formats(25, seed=3)
    uniform = [2] * 25
    found = knapsack.solve(choices.swapped(), choices.loss(uniform))
    assert choices.cost(found) <= choices.cost(uniform)
    assert choices.loss(found) <= choices.loss(uniform) * (1 + 1e-9)


def test_a_duplicated_option_changes_nothing():
    choices = formats(12)
    doubled = Choices(np.repeat(choices.losses, 2, axis=1), np.repeat(choices.costs, 2, axis=1))
    budget = at(choices, 3.4)
    assert choices.loss(knapsack.solve(choices, budget)) == doubled.loss(knapsack.solve(doubled, budget))


def test_of_equal_losses_the_cheapest():
    choices = Choices(np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), np.array([[1.0, 5.0, 2.0], [1.0, 2.0, 5.0]]))
    assert knapsack.solve(choices, 100) == (2, 1)


@pytest.mark.parametrize("solve", [knapsack.solve, milp.solve, quadratic.solve])
def test_an_infeasible_budget_says_what_is_feasible(solve):
    choices = formats(5)
    with pytest.raises(InfeasibleError, match="the least that is possible") as caught:
        solve(choices, choices.cheapest() - 1)
    assert caught.value.least == choices.cheapest()
    assert choices.cost(solve(choices, caught.value.least)) == pytest.approx(choices.cheapest())


def test_two_budgets_at_once():
    choices = formats(10, seed=4)
    seconds = np.random.default_rng(0).uniform(1, 2, choices.costs.shape)
    budget = at(choices, 4)
    alone = milp.solve(choices, budget)
    spent = seconds[np.arange(10), list(alone)].sum()
    both = milp.solve(choices, budget, further=[(seconds, 0.9 * spent)])
    assert seconds[np.arange(10), list(both)].sum() <= 0.9 * spent * (1 + 1e-6)
    assert choices.loss(both) >= choices.loss(alone)
    with pytest.raises(InfeasibleError):
        milp.solve(choices, budget, further=[(seconds, 1.0)])


def test_the_search_is_close_where_the_program_is_too_large(monkeypatch):
    base = formats(14, seed=5)
    rng = np.random.default_rng(5)
    near = {(i, i + 1): 0.3 * rng.normal(size=(6, 6)) * base.losses[i][:, None] for i in range(13)}
    choices = Choices(base.losses, base.costs, near)
    budget = at(base, 3.3)
    exact = choices.loss(quadratic.solve(choices, budget))
    monkeypatch.setattr(quadratic, "_LARGEST", 0)
    found = quadratic.solve(choices, budget)
    assert choices.cost(found) <= budget
    assert exact <= choices.loss(found) <= exact * 1.05
    assert choices.loss(found) <= choices.loss(knapsack.solve(base, budget)), "the knapsack does not see pairs"


def test_where_the_diagonal_order_is_wrong():
    """Two items that are harmless alone and ruin it together: the augmented losses see it, the diagonal does not."""
    losses = np.array([[1.0, 0.0], [1.1, 0.0], [1.5, 0.0]])
    pair = np.array([[4.0, 0.0], [0.0, 0.0]])
    choices = Choices(losses, np.array([[1.0, 2.0]] * 3), {(0, 1): pair})
    assert knapsack.solve(Choices(losses, choices.costs), 4) == (0, 0, 1)
    assert quadratic.solve(choices, 4) == (0, 1, 0)
    assert choices.loss(knapsack.solve(quadratic.augmented(choices), 4)) < choices.loss((0, 0, 1))
