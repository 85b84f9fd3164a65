"""Everything that can be refused before an hour is spent."""

from __future__ import annotations

import difflib
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from torch import nn

from quantlab.engine.architecture import Architecture, features
from quantlab.engine.device import free_bytes
from quantlab.engine.estimate import memory_needs, result_size
from quantlab.engine.needs import Needs
from quantlab.engine.solve import PlannedLayer, plan_layer
from quantlab.errors import PreflightError, RecipeError
from quantlab.recipe import Recipe, matches

_USUAL_GROUPS = (256, 128, 96, 64, 48, 32, 16)
_GIB = 1 << 30


def plan(recipe: Recipe, architecture: Architecture, model: nn.Module) -> dict[str, PlannedLayer]:
    """What the recipe does with each layer; layers that stay as they are are left out.

    The recipe's default is for the linear layers of the blocks. A layer outside (a head) and an embedding are quantized
    only if a pattern names them.

    Raises:
        RecipeError: a pattern that matches no layer, a method or option that does not exist, activations that do not
            go with a layer's weight.
        PreflightError: a group size that does not divide a layer's inputs; a recipe that leaves nothing to do.
    """
    patterns = {name: recipe.patterns_for(name) for name in architecture.quantizable}
    matching = set().union(*patterns.values())
    for pattern in recipe.layers:
        if pattern not in matching:
            raise RecipeError(unmatched(pattern, architecture, model))
    planned: dict[str, PlannedLayer] = {}
    blocks = {name: block for block, names in architecture.layers.items() for name in names}
    for name in architecture.quantizable:
        scheme = recipe.scheme(name)
        if not scheme.keeps and (name in blocks or patterns[name]):
            if name in architecture.embeddings and scheme.activations != "none":
                raise RecipeError(
                    f"{name}: activations {scheme.activations}: an embedding is looked up and multiplies nothing; "
                    "set activations: none for it"
                )
            shape = features(model.get_submodule(name))
            planned[name] = plan_layer(name, blocks.get(name, ""), shape, scheme)
    if not planned:
        raise PreflightError(
            f"recipe {recipe.name!r} leaves every layer of the model as it is: nothing to quantize; set a format, "
            "for example --set format=int4"
        )
    _check_groups(planned.values())
    _check_tied(planned, architecture, model)
    return planned


def _check_tied(planned: Iterable[str], architecture: Architecture, model: nn.Module) -> None:
    """Refuse to quantize an embedding alone that a head shares: the head would keep a copy, and nothing be saved."""
    for name in set(planned).intersection(architecture.embeddings):
        weight = model.get_submodule(name).weight
        for head in architecture.quantizable:
            if head not in planned and model.get_submodule(head).weight is weight:
                raise PreflightError(
                    f"{name}: shares its weight with {head}, which would keep the original; name both in the recipe, "
                    f"for example layers: {{{name}: {{format: int8}}, {head}: {{format: int8}}}}, or neither"
                )


def _check_groups(layers: Iterable[PlannedLayer]) -> None:
    bad = [layer for layer in layers if undivided(layer)]
    if not bad:
        return
    layer = bad[0]
    widths = {layer.shape[1] for layer in bad}
    fitting = [*(str(g) for g in _USUAL_GROUPS if all(width % g == 0 for width in widths)), "channel"]
    others = f" (and {len(bad) - 1} more layers like it)" if len(bad) > 1 else ""
    choices = " or ".join(dict.fromkeys([*fitting[:2], "channel"]))
    raise PreflightError(
        f"{layer.name}: in_features {layer.shape[1]} is not divisible by group size "
        f"{layer.scheme.granularity}{others}; use {choices}, for example --set granularity={fitting[0]}, or for these "
        "layers alone, by a pattern under `layers:` in the recipe"
    )


def undivided(layer: PlannedLayer) -> bool:
    """Whether the layer's inputs cannot be cut into groups of the size that its scheme wants."""
    granularity = layer.scheme.granularity
    return isinstance(granularity, int) and layer.shape[1] % granularity != 0


def unmatched(pattern: str, architecture: Architecture, model: nn.Module) -> str:
    """What to say of a pattern that matches no layer: the nearest names."""
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    if any(matches(pattern, name) for name in embeddings):
        return (
            f"layers[{pattern!r}] names an embedding that computes more than a lookup, or is part of a block: it stays "
            "as it is; remove the pattern"
        )
    # One representative of each family of layers: model.layers.*.mlp.down_proj
    families = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in architecture.all_layers})
    wanted = pattern.removeprefix("re:")
    close = difflib.get_close_matches(wanted, families + architecture.all_layers, n=3, cutoff=0.5) or [
        family
        for family in families
        if difflib.get_close_matches(wanted.strip("*.").split(".")[-1], family.split("."), n=1)
    ]
    hint = f"nearest are {', '.join(close[:3])}" if close else f"the model has {', '.join(families)}"
    return f"layers[{pattern!r}] matches no linear layer of the model; {hint}"


def check_resources(
    plan: dict[str, PlannedLayer],
    architecture: Architecture,
    model: nn.Module,
    tokens: int,
    out: Path,
    budget: int | None,
    device: torch.device,
) -> Needs:
    """Refuse a run that memory, the device or the disk cannot hold; otherwise, what it will hold.

    Args:
        plan: what will be done.
        architecture: the model's parts.
        model: its skeleton.
        tokens: of the calibration data; 0 if no layer needs any.
        out: where the result will be.
        budget: bytes of memory that the process may take; batches and statistics that do not fit go to the disk.
            None: they all stay.
        device: where blocks are computed.

    Raises:
        PreflightError: says what is needed, what is there, and what takes less.
    """
    whole = memory_needs(plan, architecture, model, tokens)
    needs = Needs(whole) if device.type == "cpu" else whole.parted(free_bytes(device))
    if budget is not None:
        needs = replace(needs, memory=needs.memory.within(budget))
    refuse_memory(needs.memory.own, psutil.virtual_memory().available)
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    needed = result_size(plan, model) + whole.states - needs.states + needs.memory.waiting
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise PreflightError(
            f"{out}: the run takes about {needed / _GIB:.1f} GiB and {free / _GIB:.1f} GiB are free on that disk; "
            "free some space or choose another --out"
        )
    return needs


def check_memory(
    plan: dict[str, PlannedLayer], architecture: Architecture, model: nn.Module, tokens: int, device: torch.device
) -> None:
    """Refuse a run that memory, or the device that holds all of it, cannot hold; see :func:`check_resources`."""
    needed = memory_needs(plan, architecture, model, tokens).own
    if device.type == "cpu":
        refuse_memory(needed, psutil.virtual_memory().available)
    elif (room := free_bytes(device)) is not None and needed > room:
        raise PreflightError(
            f"the run needs about {needed / 1e9:.2f} GB on {device} and {room / 1e9:.2f} GB are free there; use fewer "
            "calibration tokens, for example --set calibration.samples=16, or --device cpu"
        )


def refuse_memory(needed: int, available: int) -> None:
    """Refuse a run that wants more memory than is free."""
    if needed > available:
        raise PreflightError(
            f"the run needs about {needed / _GIB:.1f} GiB of memory and {available / _GIB:.1f} GiB are free; use "
            "fewer calibration tokens, for example --set calibration.samples=16, let batches and statistics wait on "
            "the disk with --memory, or close other programs"
        )
