"""Whether numbers are numbers."""

from __future__ import annotations

import pytest
import torch

from quantlab.numerics import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_one_odd_number_is_found_wherever_it_is(dtype, odd):
    tensor = torch.linspace(-3, 3, 35).view(5, 7).to(dtype)
    assert all_finite(tensor)
    for place in ((0, 0), (2, 3), (4, 6)):
        wrong = tensor.clone()
        wrong[place] = odd
        assert not all_finite(wrong)
