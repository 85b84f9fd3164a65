"""Sensitivity ``error``: the squared error of each layer's output, times how much of it is felt at the model's end.

One pass over the calibration text takes the second moments of all inputs; every candidate is solved by its own method
(GPTQ's error is GPTQ's, not round-to-nearest's) on some rows of each layer. One backward pass over a little of the text
gives the coefficients (:mod:`quantlab.allocation.curvature`), or noise does, or all layers count alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from quantlab.allocation.curvature import coefficients, injected
from quantlab.allocation.resumed import ResumedDivergence
from quantlab.allocation.sensitivity import NATS, Sensitivity, Unit
from quantlab.allocation.task import Task, spread
from quantlab.engine.architecture import OUTSIDE
from quantlab.engine.progress import Silent
from quantlab.engine.survey import Measured, Survey
from quantlab.errors import PreflightError

# Tokens that second moments are taken over, at least, and for each input of the widest layer: with fewer, errors look
# smaller than they are where a layer is wide. Rows of a layer that each candidate is solved for. Tokens that gradients
# are taken over.
TOKENS, TOKENS_AN_INPUT, ROWS, GRADIENT_TOKENS = 8192, 6, 32, 4096
_GRADIENT_LENGTH, _NOISE_TOKENS = 256, 1024
COEFFICIENTS = ("gradient", "noise", "none")

Look = Callable[[tuple[str, ...], dict[int, dict[str, torch.Tensor]]], None]


def measure(task: Task) -> Sensitivity:
    """Errors of all layers under all candidates, weighted.

    Options: ``coefficients``: ``gradient``, ``noise``, or ``none``, which needs no more memory than one block; ``rows``
    of a layer that are solved.

    Raises:
        PreflightError: no candidate can be carried out; memory cannot hold the model for gradients.
    """
    how = task.options.get("coefficients", COEFFICIENTS[0])
    if how not in COEFFICIENTS:
        raise PreflightError(f"coefficients {how!r}: use one of {', '.join(COEFFICIENTS)}")
    rows = task.options.get("rows", ROWS)
    if type(rows) is not int or rows < 1:
        raise PreflightError(f"rows {rows!r}: use a whole number, at least 1")
    if how != "none":
        task.refuse_too_large(torch.float32 if how == "noise" else None, twice=how == "gradient")
    measured, groups, refused = survey(task, rows)
    scales, unreached = dict.fromkeys(task.names, 1.0), list[str]()
    if how != "none":
        scales, unreached = _scales(task, measured, _injected(task) if how == "noise" else _coefficients(task))
    units = []
    for name in task.names:
        losses, errors = np.full(len(task.candidates), math.inf), np.full(len(task.candidates), math.inf)
        losses[task.kept] = errors[task.kept] = 0.0
        for number, found in measured[name].items():
            errors[number] = found.report.error
            losses[number] = found.report.error * scales[name]
        units.append(Unit((name,), tuple(losses.tolist()), tuple(errors.tolist())))
    notes = [f"{task.candidates[number].name}: left out: {reason}" for number, reason in refused.items()]
    if unreached:
        more = f" and {len(unreached) - 1} more" if len(unreached) > 1 else ""
        notes.append(f"{unreached[0]}{more}: not reached by the text, judged by the error of their weights")
    return Sensitivity(
        method="error",
        unit="relative squared error of outputs, summed over layers" if how == "none" else NATS,
        candidates=task.candidates,
        units=tuple(units),
        groups=tuple(groups),
        notes=tuple(notes),
    )


def _scales(
    task: Task, measured: Mapping[str, Mapping[int, Measured]], weights: Mapping[str, float]
) -> tuple[dict[str, float], list[str]]:
    """Nats for a unit of each layer's relative error; and layers of which the text says nothing: a vision tower.

    Such a layer gets the median of the others. An expert that nothing was routed to loses nothing.
    """
    scales = {}
    for name in task.names:
        found = next(iter(measured[name].values()), None)
        energy = 0.0 if found is None else found.energy
        if found is not None and name in task.architecture.embeddings:
            energy /= found.report.shape[0]  # what an embedding returns for a token is one row of it
        scales[name] = weights[name] * energy
    reached = [scale for scale in scales.values() if scale > 0]
    unreached = [name for name, scale in scales.items() if scale == 0 and name not in task.architecture.routed]
    return scales | dict.fromkeys(unreached, float(np.median(reached)) if reached else 1.0), unreached


def survey(
    task: Task, rows: int | None, look: Look | None = None
) -> tuple[dict[str, dict[int, Measured]], list[tuple[str, ...]], dict[int, str]]:
    """Each layer under each candidate, by number; layers that share an input; candidates that were refused.

    Args:
        task: what is measured.
        rows: of a layer that are solved; None: all.
        look: shown each group's quantized weights, by candidate's number and layer.
    """
    if not task.plans:
        return {name: {} for name in task.names}, [(name,) for name in task.names], {}
    numbers = list(task.plans)
    tokens = task.tokens[observed(task)]
    batches = list(tokens.split(max(1, 1024 // tokens.shape[1])))
    ways = [dict(task.plans[number]) for number in numbers]
    progress = _Blocks(task)
    skeleton = task.source.skeleton()

    def show(group: tuple[str, ...], shown: dict[int, dict[str, torch.Tensor]]) -> None:
        if look is not None:
            look(group, {numbers[place]: weights for place, weights in shown.items()})

    run = Survey(
        task.source, skeleton, task.architecture, ways, batches, progress, rows, show if look is not None else None
    )
    found = run.execute()
    by_layer: dict[str, dict[int, Measured]] = {name: {} for name in task.names}
    for entry in found:
        by_layer[entry.report.layer][numbers[entry.plan]] = entry
    return by_layer, run.groups, {numbers[place]: reason for place, reason in run.refused.items()}


def observed(task: Task) -> torch.Tensor:
    """Which calibration sequences second moments are taken over, spread evenly over all."""
    widest = max(task.weight(name).shape[-1] for name in task.names)
    return spread(len(task.tokens), -(-max(TOKENS, TOKENS_AN_INPUT * widest) // task.tokens.shape[1]))


def _coefficients(task: Task) -> dict[str, float]:
    return coefficients(task.model(twice=True), list(task.names), _short(task, GRADIENT_TOKENS), tell=task.tell)


def _injected(task: Task) -> dict[str, float]:
    divergence = ResumedDivergence(task.model(torch.float32), task.architecture, _short(task, _NOISE_TOKENS))
    return injected(divergence, task.names, tell=task.tell)


def _short(task: Task, tokens: int) -> torch.Tensor:
    """The beginnings of some sequences."""
    length = min(_GRADIENT_LENGTH, task.tokens.shape[1])
    return task.tokens[spread(len(task.tokens), tokens // length), :length]


class _Blocks(Silent):
    """Tells of blocks."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._order: Sequence[str] = [*task.architecture.blocks, OUTSIDE]

    def block(self, name: str) -> None:
        """A block is being loaded."""
        if name != OUTSIDE:
            ways = len(self._task.plans)
            done, total = self._order.index(name), len(self._order) - 1
            self._task.tell(done, total, f"{name} under {ways} candidates")
