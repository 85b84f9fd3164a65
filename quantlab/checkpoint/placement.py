"""A model's tensors and their places: which are selected, filling them, emptying them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

Select = str | Callable[[str], bool]
"""Which tensors: a module's name (all under it; ``""`` is everything), or a predicate of full names."""

Places = list[tuple[nn.Module, str, str]]
"""Where one tensor stands in a model: module, attribute and full name; several if it is tied."""


def all_tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, torch.Tensor]]:
    """Every parameter and persistent buffer at every place: module, attribute, full name, tensor."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                yield module, leaf, prefix + leaf, parameter
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                yield module, leaf, prefix + leaf, buffer


def selected(model: nn.Module, select: Select = "") -> list[tuple[torch.Tensor, Places]]:
    """Each parameter and persistent buffer of which some name is selected, once, with all its places."""
    places: dict[int, tuple[torch.Tensor, Places]] = {}
    chosen: dict[int, None] = {}
    for module, leaf, name, tensor in all_tensors(model):
        places.setdefault(id(tensor), (tensor, []))[1].append((module, leaf, name))
        if _is_selected(name, select):
            chosen[id(tensor)] = None
    return [places[key] for key in chosen]


def assign(places: Places, tensor: torch.Tensor) -> None:
    """Put ``tensor`` at all these places, as one parameter (without gradient) or as a buffer."""
    parameter = nn.Parameter(tensor, requires_grad=False)
    for module, leaf, _ in places:
        if leaf in module._parameters:
            module._parameters[leaf] = parameter
        else:
            module._buffers[leaf] = tensor


def unload(model: nn.Module, select: Select = "") -> None:
    """Put the selected parameters and persistent buffers back to the meta device, at each of their places."""
    for tensor, places in selected(model, select):
        if not tensor.is_meta:
            assign(places, torch.empty_like(tensor, device="meta"))


def parameter_bytes(model: nn.Module, select: Select = "") -> int:
    """Bytes that the selected parameters and persistent buffers take, or would take once loaded."""
    return sum(tensor.numel() * tensor.element_size() for tensor, _ in selected(model, select))


def _is_selected(name: str, select: Select) -> bool:
    if isinstance(select, str):
        return not select or name.startswith(f"{select}.")
    return select(name)
