from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantlab_evals import ClusterMeans, EvalError, bootstrap_interval, compare


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


@pytest.mark.parametrize("clusters", [6, 12, 60])
def test_variants_that_differ_by_noise_are_not_distinguishable(clusters):
    """About one in twenty is called better by chance, and no more where clusters are few."""
    rng = np.random.default_rng(1)
    called = 0
    for seed in range(400):
        hard = rng.normal(3, 1, clusters)
        tokens = tuple(rng.integers(50, 200, clusters).tolist())
        sides = [
            ClusterMeans("documents", tokens, tuple(hard + rng.normal(0, 0.1, clusters))) for _ in ("first", "second")
        ]
        found = compare(*sides, "perplexity", of=np.exp, draws=400, seed=seed)
        called += found.better is not None
        assert (found.better is None) == ("not distinguishable" in found.verdict())
    assert called / 400 < 0.1


def test_variants_that_differ_are_told_apart_although_text_varies_more():
    rng = np.random.default_rng(0)
    hard = rng.normal(3, 1, 40)
    tokens = (100,) * 40
    first = ClusterMeans("windows", tokens, tuple(hard))
    second = ClusterMeans("windows", tokens, tuple(hard - 0.02 + rng.normal(0, 0.02, 40)))
    found = compare(first, second, "nll")
    assert found.better == "second"
    assert found.difference == pytest.approx(second.mean - first.mean)
    assert found.interval[0] < found.difference < found.interval[1] < 0
    low, high = first.interval()
    assert found.interval[1] - found.interval[0] < 0.1 * (high - low)
    assert found.verdict("w4", "w8").startswith("w8 is better than w4 by 0.0140 +- 0.0073")
    assert compare(first, second, "share", higher_is_better=True).better == "first"


def test_no_two_are_told_apart_by_too_little_text():
    tokens = (100,) * 5
    found = compare(ClusterMeans("windows", tokens, (1.0,) * 5), ClusterMeans("windows", tokens, (2.0,) * 5), "nll")
    assert found.better is None
    assert "fewer than 6 windows" in found.verdict()
    with pytest.raises(EvalError, match="measure both on the same windows"):
        compare(ClusterMeans("windows", tokens, (1.0,) * 5), ClusterMeans("documents", tokens, (2.0,) * 5), "nll")


def test_intervals_of_few_clusters_are_as_wide_as_students():
    """A plain percentile interval of six normal values covers the mean in about 87 of 100 cases."""
    rng = np.random.default_rng(3)
    intervals = [bootstrap_interval(rng.normal(3, 2, size=6), draws=400, seed=i) for i in range(400)]
    assert np.mean([low < 3 < high for low, high in intervals]) > 0.91
