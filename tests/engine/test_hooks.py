"""Hooks are gone when their context is left, however it is left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantlab.engine.hooks import hooked


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def test_they_run_until_the_context_is_left(model):
    called = []
    with hooked(layer.register_forward_pre_hook(lambda *_: called.append(1)) for layer in model):
        model(torch.ones(1, 2))
        assert len(called) == hooks_of(model) == 2
    assert hooks_of(model) == 0


def test_they_are_gone_after_an_error(model):
    with pytest.raises(KeyError), hooked([model[0].register_forward_hook(lambda *_: None)]):
        raise KeyError
    assert hooks_of(model) == 0


def test_one_that_cannot_be_made_leaves_none(model):
    with (
        pytest.raises(AttributeError),
        hooked(model.get_submodule(name).register_forward_hook(lambda *_: None) for name in ("0", "1", "none")),
    ):
        raise AssertionError("never entered")
    assert hooks_of(model) == 0
