"""A model's forward with one module's weights in memory at a time: the meaning of a folder, whatever its size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from quantlab.checkpoint.placement import unload
from quantlab.checkpoint.quantized import QuantizedFolder
from quantlab.checkpoint.source import ModelSource
from quantlab.engine.rounded_inputs import inputs_rounded

_Load = Callable[[nn.Module, set[str]], None]


def decoded_logits(folder: QuantizedFolder, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits ``[prompts, length, vocabulary]`` of prompts of one length, in float32, by weights decoded from codes.

    Nothing of how the folder is loaded for use has a part in it: no kernel, no module of ours, no plug-in; of
    activations that are rounded to 8 bits only what they are rounded to.
    """
    model = folder.skeleton(dtype=torch.float32)
    activations = {name: storage.activations for name, storage in folder.layers.items()}
    with inputs_rounded(model, activations):
        return _streamed(model, folder.load, prompts)


def original_logits(source: ModelSource, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits ``[prompts, length, vocabulary]`` of a model that is not quantized."""

    def load(model: nn.Module, names: set[str]) -> None:
        source.load(model, lambda name: name in names)

    return _streamed(source.skeleton(), load, prompts)


@torch.no_grad()
def _streamed(model: nn.Module, load: _Load, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    handles: list[Any] = []
    for path, module in model.named_modules():
        own = {f"{path}.{leaf}".lstrip(".") for leaf in _stored(module)}
        if own:
            handles.append(module.register_forward_pre_hook(lambda _, __, own=own: load(model, own)))
            handles.append(module.register_forward_hook(lambda _, __, ___, own=own: unload(model, own.__contains__)))
    try:
        done = model(input_ids=torch.tensor(prompts))
        # A bare model has no logits: its last hidden state serves as well to compare two ways to run it.
        return (done.logits if "logits" in done else done[0]).float()
    finally:
        for handle in handles:
            handle.remove()


def _stored(module: nn.Module) -> list[str]:
    """The names of a module's own parameters and persistent buffers, not those of modules in it."""
    parameters = [name for name, value in module._parameters.items() if value is not None]
    buffers = [name for name, value in module._buffers.items() if value is not None]
    return parameters + [name for name in buffers if name not in module._non_persistent_buffers_set]
