"""Plain layers that round their inputs to 8 bits, as the quantized layers in their places will."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from quantlab_kernels import rounded
from torch import nn

from quantlab.engine.hooks import hooked


@contextmanager
def inputs_rounded(
    model: nn.Module, activations: Mapping[str, str], begun: Callable[[str], bool] = lambda _: True
) -> Iterator[None]:
    """Let layers of ``model`` round what they are handed, while the context is open.

    Args:
        model: with plain layers.
        activations: by layer name, what its inputs are rounded to; ``"none"``: it is left alone.
        begun: asked with a layer's name at every call, whether it rounds yet.
    """

    def hook(name: str) -> Callable[..., tuple[torch.Tensor, ...] | None]:
        def before(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            return (rounded(inputs[0], activations[name]), *inputs[1:]) if begun(name) else None

        return before

    rounding = [name for name, kind in activations.items() if kind != "none"]
    with hooked(model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in rounding):
        yield
