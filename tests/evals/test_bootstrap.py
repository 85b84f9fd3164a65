from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantlab_evals import bootstrap_interval


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=40), st.integers(0, 5))
def test_interval_lies_within_the_values_and_is_deterministic(values, seed):
    low, high = bootstrap_interval(values, seed=seed)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert (low, high) == bootstrap_interval(values, seed=seed)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(rng.normal(3, 2, size=50), draws=300, seed=i) for i in range(300)]
    assert 0.89 < np.mean([low < 3 < high for low, high in intervals]) < 0.98


def test_interval_shrinks_as_one_over_the_root_of_n_and_agrees_with_the_normal_one():
    rng = np.random.default_rng(1)
    widths = []
    for count in (100, 1600):
        values = rng.normal(size=count)
        low, high = bootstrap_interval(values)
        assert low < values.mean() < high
        assert high - low == pytest.approx(2 * 1.96 * values.std() / count**0.5, rel=0.15)
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.25)


def test_weights_act_as_counts_of_tokens():
    low, high = bootstrap_interval([1] * 50 + [3] * 50, [3] * 50 + [1] * 50)
    assert 1 < low < (3 * 1 + 1 * 3) / 4 < high < 2
    assert bootstrap_interval([1, 4, 2], [7, 7, 7]) == pytest.approx(bootstrap_interval([1, 4, 2]))


def test_no_interval_where_nothing_can_be_said():
    assert bootstrap_interval([2.0]) is None
    assert bootstrap_interval([2.0, float("inf"), 1.0]) is None
