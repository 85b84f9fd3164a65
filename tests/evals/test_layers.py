"""Times of single layers: which calls count."""

from __future__ import annotations

import time

import pytest
import torch
from quantlab_evals import layer_timings
from torch import nn


class Slow(nn.Module):
    """A layer that waits, and notes that it was called."""

    def __init__(self, seconds, calls, name):
        super().__init__()
        self.seconds, self.calls, self.name = seconds, calls, name

    def forward(self, x):
        self.calls.append(self.name)
        time.sleep(self.seconds)
        return x


def test_layers_of_a_name_are_called_in_a_row_and_names_take_turns():
    calls, told = [], []
    layers = {
        "many": ([Slow(0.02 if place == 0 else 0.002, calls, f"m{place}") for place in range(3)], torch.ones(1)),
        "one": ([Slow(0.01, calls, "one")], torch.ones(1)),
    }
    found = layer_timings(layers, rounds=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert calls[:4] == ["m0", "m1", "m2", "one"]
    assert len(calls) == 12
    assert set(calls) == {"m0", "m1", "m2", "one"}
    assert len(found["many"].wall) == len(found["one"].wall) == 2
    assert found["one"].median == pytest.approx(0.01, rel=0.6)
    assert found["one"].cpu_median < 0.01, "waiting takes no processor"


def test_the_first_of_several_calls_is_not_counted():
    """It brings the code back into the caches; here it is the slow one."""
    first = {"many": ([Slow(0.03, [], "a"), Slow(0.001, [], "b")], torch.ones(1))}
    assert layer_timings(first, rounds=2)["many"].median < 0.02


def test_no_layers():
    assert layer_timings({}) == {}
