"""Hadamard matrices and rotations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.numerics.orthogonal import hadamard, rotation

KNOWN = [1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 40, 44, 48, 60, 64, 72, 108, 128, 144, 576, 768, 896, 960]


@pytest.mark.parametrize("order", KNOWN)
def test_hadamard_matrices_have_entries_of_one_and_orthogonal_rows(order):
    matrix = hadamard(order)
    assert matrix.shape == (order, order)
    assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))
    assert bool((matrix[0] == 1).all())
    assert bool((matrix[:, 0] == 1).all())


@pytest.mark.parametrize("order", [3, 6, 7, 9, 10, 18, 92, 172])
def test_orders_without_a_known_matrix_say_so(order):
    assert hadamard(order) is None


@settings(deadline=None, max_examples=60)
@given(width=st.integers(1, 400), seed=st.integers(0, 2**31), keep_ones=st.booleans())
def test_rotations_are_orthogonal_for_every_width(width, seed, keep_ones):
    q = rotation(width, seed, keep_ones=keep_ones).matrix
    assert q.dtype == torch.float64
    torch.testing.assert_close(q @ q.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 36, 64, 86, 172, 768])
def test_the_ones_are_kept_where_they_must_be_and_only_there(width):
    ones = torch.ones(width, dtype=torch.float64)
    kept = rotation(width, 3, keep_ones=True).matrix
    torch.testing.assert_close(ones @ kept, ones, rtol=0, atol=1e-12)
    torch.testing.assert_close(kept @ ones, ones, rtol=0, atol=1e-12)
    if width > 2:
        assert float((rotation(width, 3).apply(ones) - ones).abs().max()) > 0.1
        assert float((kept - torch.eye(width, dtype=torch.float64)).abs().max()) > 0.1


@pytest.mark.parametrize("keep_ones", [False, True])
def test_wider_tensors_are_rotated_part_by_part(keep_ones):
    turn = rotation(24, 0, keep_ones=keep_ones)
    x = torch.randn(3, 5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([x[..., :24] @ turn.matrix, x[..., 24:] @ turn.matrix], -1)
    torch.testing.assert_close(turn.apply(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [24, 64, 576])
def test_without_the_ones_every_entry_has_the_same_size(width):
    entries = rotation(width, 0).matrix.abs()
    torch.testing.assert_close(entries, torch.full_like(entries, width**-0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("keep_ones", [False, True])
def test_a_seed_says_which(keep_ones):
    first, again, other = (rotation(86, seed, keep_ones=keep_ones).matrix for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("width", [64, 576, 768])
@pytest.mark.parametrize("keep_ones", [False, True])
def test_an_outlier_is_spread_over_all_channels(width, keep_ones):
    outlier = torch.zeros(width, dtype=torch.float64)
    outlier[5] = 1
    spread = rotation(width, 0, keep_ones=keep_ones).apply(outlier)
    assert float(spread.abs().max()) < (5 if keep_ones else 1.0001) * width**-0.5
