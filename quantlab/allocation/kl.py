"""Sensitivity ``kl``: quantize one item, leave all others, and measure the KL divergence of the model's predictions.

The measure that asks the least of theory: whatever a layer's error does to what follows is in it. The forward pass is
resumed at the changed block, in float32: rounding of bfloat16 activations alone costs as much as a good candidate. It
takes a forward pass of half the model for each item and candidate, so each item's candidates are measured from the one
with the largest error on, and once one loses next to nothing the finer ones are scaled by the squared errors of their
weights, in which the loss is linear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from quantlab.allocation.error import observed, survey
from quantlab.allocation.items import agreeing
from quantlab.allocation.resumed import ResumedDivergence
from quantlab.allocation.sensitivity import NATS, Sensitivity, Unit
from quantlab.allocation.task import Task, spread
from quantlab.engine.architecture import Architecture
from quantlab.engine.survey import Measured

# Text that divergence is measured on; what a candidate loses, in nats, below which finer ones are scaled.
SEQUENCES, LENGTH, LITTLE = 4, 256, 0.003


def measure(task: Task) -> Sensitivity:
    """KL of every item under every candidate. Option ``tokens``: on how many.

    Raises:
        PreflightError: memory cannot hold the model in float32.
    """
    divergence = resumed(task)
    collected = Items(task)
    losses: dict[tuple[str, ...], np.ndarray] = {}

    def look(group: tuple[str, ...], shown: dict[int, dict[str, torch.Tensor]]) -> None:
        for item, weights in collected.complete(group, shown):
            losses[item] = _losses(task, divergence, weights)

    measured, groups, refused = survey(task, None, look)
    units = []
    for item, of_item in losses.items():
        errors = [np.mean([_error(measured[name], number) for name in item]) for number in range(len(task.candidates))]
        units.append(Unit(item, tuple(of_item.tolist()), tuple(float(error) for error in errors)))
    notes = [f"{task.candidates[number].name}: left out: {reason}" for number, reason in refused.items()]
    if not divergence.resumes:
        notes.append("forwards ran from the start: this model's blocks cannot be resumed")
    return Sensitivity("kl", NATS, task.candidates, tuple(units), tuple(groups), notes=tuple(notes))


def resumed(task: Task) -> ResumedDivergence:
    """The model in float32, on a little of the text: where there is enough, not what second moments are taken over."""
    wanted = task.options.get("tokens", SEQUENCES * LENGTH)
    length = min(LENGTH, task.tokens.shape[1])
    count = max(1, wanted // length) if isinstance(wanted, int) else SEQUENCES
    seen = set(observed(task).tolist())
    unseen = [place for place in range(len(task.tokens)) if place not in seen] or sorted(seen)
    places = torch.tensor(unseen)[spread(len(unseen), count)]
    return ResumedDivergence(task.model(torch.float32), task.architecture, task.tokens[places, :length])


class Items:
    """Groups of layers put together to items, each handed out when it is complete."""

    def __init__(self, task: Task) -> None:
        self._architecture: Architecture = task.architecture
        self._together = bool(task.options.get("together", True))
        self._names = set(task.names)
        self._waiting: dict[tuple[str, ...], dict[int, dict[str, torch.Tensor]]] = {}

    def complete(
        self, group: tuple[str, ...], shown: Mapping[int, Mapping[str, torch.Tensor]]
    ) -> list[tuple[tuple[str, ...], dict[int, dict[str, torch.Tensor]]]]:
        """Items that this group completes, and their quantized weights by candidate."""
        if not self._together:
            return [((name,), {k: {name: weights[name]} for k, weights in shown.items()}) for name in group]
        routed = self._architecture.routed
        if group[0] not in routed:
            return [(group, {k: dict(weights) for k, weights in shown.items()})]
        # Experts come one by one; those of a block are an item when the last has come.
        item = next(
            members
            for members in agreeing([(name,) for name in sorted(routed & self._names)], self._architecture)
            if group[0] in members
        )
        found = self._waiting.setdefault(item, {})
        for number, weights in shown.items():
            found.setdefault(number, {}).update(weights)
        whole = all(len(weights) == len(item) for weights in found.values())
        return [(item, self._waiting.pop(item))] if whole else []


def _losses(
    task: Task,
    divergence: ResumedDivergence,
    weights: Mapping[int, Mapping[str, torch.Tensor]],
) -> np.ndarray:
    losses = np.full(len(task.candidates), math.inf)
    losses[task.kept] = 0.0
    distance = {number: _distance(divergence, changed) for number, changed in weights.items()}
    last: int | None = None
    for number in sorted(weights, key=lambda number: -distance[number]):
        if last is not None and losses[last] < LITTLE:
            losses[number] = losses[last] * distance[number] / distance[last] if distance[last] else 0.0
        else:
            losses[number], last = max(0.0, divergence.of(weights[number])), number
    return losses


def _distance(divergence: ResumedDivergence, changed: Mapping[str, torch.Tensor]) -> float:
    """How far weights are from the original's: squares, summed."""
    return sum(float((divergence.weight(name) - weight).square().sum()) for name, weight in changed.items())


def _error(found: Mapping[int, Measured], number: int) -> float:
    return found[number].report.error if number in found else math.inf
