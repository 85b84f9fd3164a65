from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.compensation import Outlook, PlansAhead, make_compensation
from quantlab.compensation.budget import share_ranks
from quantlab.errors import RecipeError
from quantlab.numerics import QTensor, apply_scales
from quantlab.recipe import Scheme

outlooks = st.lists(
    st.tuples(
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        st.lists(st.floats(0, 1), max_size=4).map(lambda gains: tuple(sorted(gains, reverse=True))),
    ),
    min_size=1,
    max_size=4,
).map(lambda layers: {f"layer{i}": Outlook(*layer) for i, layer in enumerate(layers)})


def spent(layers, ranks, bits, overhead):
    return sum(rank * (bits * sum(layers[name].shape) + overhead) for name, rank in ranks.items())


@settings(max_examples=60, deadline=None)
@given(outlooks, st.sampled_from([(16, 0), (8, 32)]), st.floats(0.01, 20))
def test_ranks_stay_in_the_budget_and_nothing_of_like_cost_is_better(layers, stored, budget):
    ranks = share_ranks(layers, *stored, budget)
    limit = budget * sum(layer.shape[0] * layer.shape[1] for layer in layers.values())
    assert spent(layers, ranks, *stored) <= limit
    assert all(ranks[name] <= len(layer.gains) for name, layer in layers.items())
    gained = sum(sum(layer.gains[: ranks[name]]) for name, layer in layers.items())
    for other in itertools.product(*(range(len(layer.gains) + 1) for layer in layers.values())):
        choice = dict(zip(layers, other, strict=True))
        if spent(layers, choice, *stored) <= spent(layers, ranks, *stored):
            best = sum(sum(layer.gains[: choice[name]]) for name, layer in layers.items())
            # Greedy is optimal but for what is too dear for the rest of the budget: at most one rank.
            dearest = max((gain for layer in layers.values() for gain in layer.gains), default=0)
            assert best <= gained + dearest + 1e-9


def test_a_budget_for_everything_gives_everything():
    layers = {"a": Outlook((4, 8), (0.5, 0.2)), "b": Outlook((8, 8), (0.1, 0.0))}
    assert share_ranks(layers, 16, 0, 100) == {"a": 2, "b": 1}
    assert share_ranks(layers, 16, 0, 1e-9) == {"a": 0, "b": 0}


def test_what_is_foreseen_is_the_spectrum_of_the_rounding_error():
    scheme = Scheme(format="int3", granularity=16)
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    method = make_compensation("qera-exact", {"rank": 5, "budget": 0.5})
    assert isinstance(method, PlansAhead)
    assert method.plans_ahead
    outlook = method.foresee(weight, scheme)
    grid = scheme.grid_for(weight, None)
    scales = scheme.choose_scales(weight, grid, None)
    error = weight - QTensor.of(apply_scales(weight, grid, scales), scales, grid).dequantize()
    expected = torch.linalg.svdvals(error.double())[:5].square() / weight.double().square().sum()
    assert outlook.shape == (24, 32)
    assert outlook.gains == pytest.approx(expected.tolist(), rel=1e-5)


def test_shares_are_options_of_the_same_method_without_a_budget():
    method = make_compensation("lorc", {"rank": 4, "budget": 1.0, "dtype": "int8", "preserve": 3, "iterations": 2})
    layers = {"a": Outlook((16, 16), (0.5, 0.4, 0.3, 0.2)), "b": Outlook((16, 16), (0.1, 0.05, 0.01, 0.0))}
    shares = method.share(layers)
    made = {name: make_compensation("lorc", options) for name, options in shares.items()}
    assert not any(repair.plans_ahead for repair in made.values())
    assert (made["a"].rank, made["b"].rank) == (1, 0)
    assert (made["a"].dtype, made["a"].iterations, made["a"].preserve) == ("int8", 2, 1)


@pytest.mark.parametrize("budget", [0, -1, "much", True])
def test_a_budget_that_makes_no_sense_is_refused(budget):
    with pytest.raises(RecipeError, match="budget"):
        make_compensation("lorc", {"budget": budget})
