"""What must be known of all layers' weights before the first is quantized.

Tables that are fitted to the whole network, and repairs that share a budget. Both look at weights alone, one block at a
time, and give the same answer each time, so a run that goes on after an interruption goes on with the same plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from quantlab.checkpoint.source import ModelSource
from quantlab.compensation import Compensation, Outlook, PlansAhead
from quantlab.engine.architecture import Architecture, get_weight
from quantlab.engine.memory import return_freed_memory
from quantlab.engine.solve import PlannedLayer, check_finite, plan_layer
from quantlab.numerics import Sample, format_called

Plan = Mapping[str, PlannedLayer]


@torch.no_grad()
def look_ahead(
    plan: dict[str, PlannedLayer], source: ModelSource, model: nn.Module, architecture: Architecture
) -> dict[str, PlannedLayer]:
    """The plan with everything settled that depends on several layers; weights are read only if something does.

    Args:
        plan: what to do, by layer name.
        source: where weights come from.
        model: its skeleton on the meta device, and empty again afterwards.
        architecture: the model's parts.

    Raises:
        CheckpointError: a weight that is looked at is not finite.
    """
    plan = _with_fitted_formats(plan, source, model, architecture)
    return _with_shares(plan, source, model, architecture)


def _with_fitted_formats(
    plan: dict[str, PlannedLayer], source: ModelSource, model: nn.Module, architecture: Architecture
) -> dict[str, PlannedLayer]:
    """Give each format that is fitted to the whole network the table that fits all layers that have it."""
    wide = {
        name: layer
        for name, layer in plan.items()
        if layer.scheme.known_format is not None and layer.scheme.known_format.network_wide
    }
    count = Counter(layer.scheme.format for layer in wide.values())
    samples: dict[str, list[Sample]] = {}
    for layer, weight in _weights(wide, source, model, architecture):
        name = layer.scheme.format
        some = Sample(weight, layer.scheme.granularity).share(count[name])
        samples.setdefault(name, []).append(some)
    names = {}
    for name, parts in samples.items():
        fit = format_called(name).fit
        assert fit is not None
        names[name] = fit(parts).name
    return {**plan, **{name: _changed(layer, format=names[layer.scheme.format]) for name, layer in wide.items()}}


def _with_shares(
    plan: dict[str, PlannedLayer], source: ModelSource, model: nn.Module, architecture: Architecture
) -> dict[str, PlannedLayer]:
    """Give layers whose repair shares something with others their share of it."""
    sharing = {
        name: layer
        for name, layer in plan.items()
        if isinstance(layer.compensation, PlansAhead) and layer.compensation.plans_ahead
    }
    outlooks: dict[Compensation, dict[str, Outlook]] = {}
    for layer, weight in _weights(sharing, source, model, architecture):
        assert isinstance(layer.compensation, PlansAhead)
        outlook = layer.compensation.foresee(weight, layer.scheme)
        outlooks.setdefault(layer.compensation, {})[layer.name] = outlook
    settled = dict(plan)
    for compensation, foreseen in outlooks.items():
        assert isinstance(compensation, PlansAhead)
        for name, options in compensation.share(foreseen).items():
            settled[name] = _changed(plan[name], compensation_options=options)
    return settled


def _weights(
    layers: Plan, source: ModelSource, model: nn.Module, architecture: Architecture
) -> Iterator[tuple[PlannedLayer, torch.Tensor]]:
    """The weights of some layers, float32 ``[out, in]``, with one block's in memory at a time."""
    for names in (*architecture.layers.values(), architecture.outside):
        wanted = [name for name in names if name in layers]
        if not wanted:
            continue
        tensors = {f"{name}.weight" for name in wanted}
        source.load(model, tensors.__contains__)
        for name in wanted:
            weight = get_weight(model.get_submodule(name))
            check_finite([layers[name]], {name: weight}, None)
            yield layers[name], weight.float()
        source.unload(model, tensors.__contains__)
        return_freed_memory()


def _changed(layer: PlannedLayer, **changes: Any) -> PlannedLayer:
    return plan_layer(layer.name, layer.block, layer.shape, replace(layer.scheme, **changes))
