"""Sensitivity ``delta-loss``: the first-order change of the loss, by one backward pass a candidate.

As in AutoRound's AutoScheme all layers are rounded by a candidate; at that point the gradient by a layer's weight,
times what rounding changed, says what the layer's own rounding adds to the loss: ``sum |g * (W - Q)|``. Weights are
rounded to nearest: the direction that a better method would leave is not known before inputs are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from quantlab.allocation.curvature import backward
from quantlab.allocation.resumed import shared_groups
from quantlab.allocation.sensitivity import Sensitivity, Unit
from quantlab.allocation.task import Task, spread
from quantlab.engine.architecture import get_weight
from quantlab.engine.hooks import hooked
from quantlab.problem import InputStatistics, LayerProblem
from quantlab.quantizers.rtn import Rtn

# Text that gradients are taken over, a batch at a time.
TOKENS, LENGTH, BATCH = 2048, 256, 4


def measure(task: Task) -> Sensitivity:
    """First-order changes of the loss, of all layers under all candidates.

    Raises:
        PreflightError: memory cannot hold the model twice.
    """
    model = task.model(twice=True)
    groups = shared_groups(model, task.architecture, task.names, task.tokens[:1, :32])
    tokens = task.tokens[spread(len(task.tokens), TOKENS // LENGTH), :LENGTH]
    losses = {name: np.full(len(task.candidates), math.inf) for name in task.names}
    for of_layer in losses.values():
        of_layer[task.kept] = 0.0
    for done, number in enumerate(task.plans):
        task.tell(done, len(task.plans), f"gradients with all layers in {task.candidates[number].name}")
        with rounded(model, task, number) as originals:
            scores = weighted_gradients(model, originals, tokens)
        for name, score in scores.items():
            losses[name][number] = score
    return Sensitivity(
        method="delta-loss",
        unit="first-order change of the loss, absolute values summed",
        candidates=task.candidates,
        units=tuple(Unit((name,), tuple(of_layer.tolist())) for name, of_layer in losses.items()),
        groups=tuple(groups),
    )


@contextmanager
def rounded(model: PreTrainedModel, task: Task, number: int) -> Iterator[dict[str, torch.Tensor]]:
    """All layers rounded to nearest by a candidate; yields their original weights, ``[out, in]``."""
    originals: dict[str, torch.Tensor] = {}
    scheme = replace(task.candidates[number].scheme, quantizer="rtn", options={}, compensation="none")
    try:
        for name in task.names:
            if name in task.tied_seconds:  # shares the weight of one that is rounded already
                originals[name] = originals[task.tied_seconds[name]]
                continue
            weight = get_weight(model.get_submodule(name))
            originals[name] = weight.clone()
            problem = LayerProblem(name, weight.float(), InputStatistics(tokens=0))
            weight.copy_(Rtn().quantize(problem, scheme).qtensor.dequantize())
        yield originals
    finally:
        for name, original in originals.items():
            get_weight(model.get_submodule(name)).copy_(original)


def weighted_gradients(
    model: PreTrainedModel, originals: dict[str, torch.Tensor], tokens: torch.Tensor
) -> dict[str, float]:
    """``sum |g * (W - Q)|`` of each layer of a rounded model, nats a token, averaged over batches."""
    scores = dict.fromkeys(originals, 0.0)
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[name] = args[0].detach()

        return before

    with hooked(model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in originals):
        batches = tokens.split(BATCH)
        for batch in batches:
            count = batch[:, 1:].numel() * len(batches)

            def take(name: str, gradient: torch.Tensor, count: int = count) -> None:
                module, x = model.get_submodule(name), inputs[name]
                weight, rows = get_weight(module), gradient.reshape(-1, gradient.shape[-1])
                if isinstance(module, nn.Embedding):
                    of_weight = torch.zeros_like(weight).index_add_(0, x.flatten(), rows.to(weight.dtype))
                else:
                    of_weight = rows.T @ x.reshape(-1, x.shape[-1])
                scores[name] += float((of_weight.float() * (originals[name] - weight).float()).abs().sum()) / count

            backward(model, list(originals), batch, None, take)
    return scores
