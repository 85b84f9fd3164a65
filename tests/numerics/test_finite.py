"""Whether numbers are numbers."""

from __future__ import annotations

import sys
from itertools import product

import pytest
import torch

from quantlab.numerics import all_finite

NAN, INFINITY = float("nan"), float("inf")
ODD = [
    *product((torch.float32, torch.float64, torch.float16, torch.bfloat16), (NAN, INFINITY, -INFINITY)),
    (torch.float8_e4m3fn, NAN),  # has no infinity
    *product((torch.float8_e5m2,), (NAN, INFINITY, -INFINITY)),
    (torch.float8_e8m0fnu, NAN),  # nor has this one
]


@pytest.mark.parametrize(("dtype", "odd"), ODD)
def test_one_odd_number_is_found_wherever_it_is(dtype, odd):
    tensor = torch.linspace(0.5, 3, 35).view(5, 7).to(dtype)
    assert all_finite(tensor)
    for place in ((0, 0), (2, 3), (4, 6)):
        wrong = tensor.clone()
        wrong[place] = odd
        assert not all_finite(wrong)


def test_numbers_of_8_bits_are_looked_at_to_the_last(monkeypatch):
    monkeypatch.setattr(sys.modules["quantlab.numerics.finite"], "_PIECE", 8)
    tensor = torch.ones(3, 9).to(torch.float8_e4m3fn)
    assert all_finite(tensor)
    tensor[2, 8] = NAN
    assert not all_finite(tensor)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_whole_numbers_and_nothing_are_finite(dtype):
    assert all_finite(torch.ones(3, 4, dtype=dtype))
    assert all_finite(torch.empty(0, 4, dtype=dtype))
    assert all_finite(torch.empty(0, 4))
