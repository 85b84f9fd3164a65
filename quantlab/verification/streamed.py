"""A model's forward with one module's weights in memory at a time: the meaning of a folder, whatever its size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from quantlab.checkpoint.placement import assign, selected, unload
from quantlab.checkpoint.quantized import QuantizedFolder
from quantlab.checkpoint.source import ModelSource
from quantlab.engine.hooks import hooked
from quantlab.engine.rounded_inputs import inputs_rounded

SHAKE = 2.0**-18
"""How far inputs are moved, as a part of themselves: well above what rounding of float32 does, and as harmless."""

_Load = Callable[[nn.Module, set[str]], None]


def decoded_logits(
    folder: QuantizedFolder,
    prompts: Sequence[Sequence[int]],
    *,
    through: Mapping[str, torch.dtype] | None = None,
    shaken: bool = False,
) -> torch.Tensor:
    """Logits ``[prompts, length, vocabulary]`` of prompts of one length, in float32, by weights decoded from codes.

    Nothing of how the folder is loaded for use has a part in it: no kernel, no module of ours, no plug-in; of
    activations that are rounded to 8 bits only what they are rounded to.

    Args:
        folder: the model.
        prompts: token ids.
        through: dtypes that decoded weights, by name, are rounded to before they are float32 again, as some loaders do.
        shaken: move what comes into each module in the last prompt by :data:`SHAKE` of itself, up or down at random.
    """
    model = folder.skeleton(dtype=torch.float32)
    activations = {name: storage.activations for name, storage in folder.layers.items()}

    def load(model: nn.Module, names: set[str]) -> None:
        folder.load(model, names)
        for name in names & (through or {}).keys():
            for tensor, places in selected(model, name.__eq__):
                assign(places, tensor.to((through or {})[name]).float())

    with inputs_rounded(model, activations):
        return _streamed(model, load, prompts, shaken)


def original_logits(source: ModelSource, prompts: Sequence[Sequence[int]], *, shaken: bool = False) -> torch.Tensor:
    """Logits ``[prompts, length, vocabulary]`` of a model that is not quantized, in float32; see above."""

    def load(model: nn.Module, names: set[str]) -> None:
        source.load(model, names.__contains__)
        for tensor, places in selected(model, names.__contains__):
            if tensor.is_floating_point():
                assign(places, tensor.float())

    return _streamed(source.skeleton(), load, prompts, shaken)


@torch.no_grad()
def _streamed(model: nn.Module, load: _Load, prompts: Sequence[Sequence[int]], shaken: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)

    def shake(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # An expert is given some tokens of all prompts: what comes to its router is moved, and that suffices.
        x = inputs[0] if inputs else None
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or len(x) != len(prompts):
            return None
        moved = x.clone()
        moved[-1] *= 1 + SHAKE * torch.empty_like(x[-1]).uniform_(-1, 1, generator=generator)
        return (moved, *inputs[1:])

    def handles() -> Iterator[RemovableHandle]:
        for path, module in model.named_modules():
            own = {f"{path}.{leaf}".lstrip(".") for leaf in _stored(module)}
            if own:
                yield module.register_forward_pre_hook(lambda _, __, own=own: load(model, own))
                yield module.register_forward_hook(lambda _, __, ___, own=own: unload(model, own.__contains__))
                if shaken:
                    yield module.register_forward_pre_hook(shake)

    with hooked(handles()):
        done = model(input_ids=torch.tensor(prompts))
    # A bare model has no logits: its last hidden state serves as well to compare two ways to run it.
    return (done.logits if "logits" in done else done[0]).float()


def _stored(module: nn.Module) -> list[str]:
    """The names of a module's own parameters and persistent buffers, not those of modules in it."""
    parameters = [name for name, value in module._parameters.items() if value is not None]
    buffers = [name for name, value in module._buffers.items() if value is not None]
    return parameters + [name for name in buffers if name not in module._non_persistent_buffers_set]
