"""Which layers are looked at, and what each of several schemes would do with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from quantlab.engine.architecture import OUTSIDE, Architecture, features
from quantlab.engine.preflight import undivided, unmatched
from quantlab.engine.solve import PlannedLayer, plan_layer
from quantlab.errors import PreflightError, RecipeError
from quantlab.problem import Statistic
from quantlab.recipe import Scheme, matches

Plan = dict[str, PlannedLayer]
"""What to do with each layer, by name."""


def choose_layers(
    patterns: Sequence[str] | None, blocks: int | None, architecture: Architecture, model: nn.Module
) -> tuple[list[str], str]:
    """Which layers are looked at.

    Args:
        patterns: of layers, as in recipes; None: the linear layers of some blocks.
        blocks: how many, spread evenly over the model; None: all.
        architecture: the model's parts.
        model: its skeleton.

    Returns:
        Their names, in the order of definition, and how they were chosen, in words.

    Raises:
        RecipeError: a pattern that matches no layer.
        PreflightError: a number of blocks that cannot be.
    """
    if patterns is not None:
        for pattern in patterns:
            if not any(matches(pattern, name) for name in architecture.all_layers):
                raise RecipeError(unmatched(pattern, architecture, model))
        if not patterns:
            raise RecipeError("layers is empty: name a pattern, such as *.mlp.down_proj, or leave it out")
        names = [name for name in architecture.all_layers if any(matches(pattern, name) for pattern in patterns)]
        return names, f"{len(names)} layers that match {', '.join(patterns)}"
    if blocks is not None and (type(blocks) is not int or blocks < 1):
        raise PreflightError(f"blocks {blocks!r}: use a whole number, at least 1, or None for all")
    total = len(architecture.blocks)
    count = total if blocks is None else min(blocks, total)
    # The middle of each of `count` equal parts: the first and the last block are often unlike all others.
    chosen = [architecture.blocks[(2 * index + 1) * total // (2 * count)] for index in range(count)]
    names = [name for block in chosen for name in architecture.layers[block]]
    if count == total:
        return names, f"all {len(names)} linear layers of all {total} blocks"
    return names, f"all {len(names)} linear layers of {count} of {total} blocks, evenly spread: {', '.join(chosen)}"


def plan_each(
    schemes: Sequence[Scheme], names: Sequence[str], architecture: Architecture, model: nn.Module
) -> tuple[dict[int, Plan], dict[int, str]]:
    """For each scheme, by index, what to do with each layer; or, of those that cannot be carried out, why."""
    block_of = {name: block for block, layers in architecture.layers.items() for name in layers}
    shapes = {name: features(model.get_submodule(name)) for name in names}
    plans: dict[int, Plan] = {}
    refused: dict[int, str] = {}
    for index, scheme in enumerate(schemes):
        try:
            plan = {name: plan_layer(name, block_of.get(name, OUTSIDE), shapes[name], scheme) for name in names}
        except RecipeError as error:
            refused[index] = str(error)
            continue
        if bad := [layer for layer in plan.values() if undivided(layer)]:
            width = bad[0].shape[1]
            refused[index] = f"{bad[0].name}: in_features {width} is not divisible by group size {scheme.granularity}"
        else:
            plans[index] = plan
    return plans, refused


def wanted(plans: Iterable[Plan]) -> Statistic:
    """What any of the plans wants to be kept of any layer's inputs."""
    found = Statistic.NONE
    for plan in plans:
        for layer in plan.values():
            found |= layer.needs
    return found
