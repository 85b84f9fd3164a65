"""Sensitivity ``hessian`` (HAWQ-V2, arXiv:1911.03852): the Hessian's mean eigenvalue times the squared perturbation.

    1/2 tr(H_l) / n_l |W_l - Q_l|^2,    H_l: second derivative of the loss by the n_l weights of layer l

Traces by Hutchinson: ``tr(H) = E[v^T H v]``, v of random signs, with products by differentiating twice. One draw of
signs for all layers at once serves each: products between layers have mean zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from quantlab.allocation.error import ROWS, survey
from quantlab.allocation.sensitivity import Sensitivity, Unit
from quantlab.allocation.task import Task, spread
from quantlab.errors import PreflightError

# Random signs that are drawn, and text that the loss is taken on.
PROBES, SEQUENCES, LENGTH = 16, 4, 64


def measure(task: Task) -> Sensitivity:
    """Traces of all layers, and the perturbations of all candidates. Option ``probes``.

    Raises:
        PreflightError: memory cannot hold the model in float32; the model cannot be differentiated twice.
    """
    probes = task.options.get("probes", PROBES)
    if type(probes) is not int or probes < 1:
        raise PreflightError(f"probes {probes!r}: use a whole number, at least 1")
    task.refuse_too_large(torch.float32, twice=True)
    measured, groups, refused = survey(task, ROWS)
    model = task.model(torch.float32, twice=True)
    squares = {name: float(model.get_submodule(name).get_parameter("weight").square().sum()) for name in task.names}
    traces = layer_traces(model, task, task.tokens[spread(len(task.tokens), SEQUENCES), :LENGTH], probes)
    counts = task.weights()
    units = []
    for name in task.names:
        losses = np.full(len(task.candidates), math.inf)
        losses[task.kept] = 0.0
        for number, found in measured[name].items():
            losses[number] = 0.5 * max(traces[name], 0.0) / counts[name] * found.weight_error * squares[name]
        units.append(Unit((name,), tuple(losses.tolist())))
    return Sensitivity(
        method="hessian",
        unit="mean eigenvalue of the Hessian times squared perturbation, halved",
        candidates=task.candidates,
        units=tuple(units),
        groups=tuple(groups),
        notes=tuple(f"{task.candidates[number].name}: left out: {reason}" for number, reason in refused.items()),
    )


def layer_traces(model: PreTrainedModel, task: Task, tokens: torch.Tensor, probes: int) -> dict[str, float]:
    """The trace of each layer's Hessian of the mean negative log-likelihood of a text.

    Raises:
        PreflightError: a part of the model has no second derivative.
    """
    model.set_attn_implementation("eager")  # fused attention has no second derivative
    weights = [model.get_submodule(name).get_parameter("weight").requires_grad_() for name in task.names]

    def loss() -> torch.Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())

    try:
        estimates = traces(loss, weights, probes, lambda done: task.tell(done, probes, "second derivatives"))
    except RuntimeError as error:
        raise PreflightError(
            f"{type(model).__name__} cannot be differentiated twice ({' '.join(str(error).split())}); use sensitivity "
            "error, which needs first derivatives alone"
        ) from error
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return dict(zip(task.names, estimates, strict=True))


def traces(
    loss: Callable[[], torch.Tensor],
    weights: Sequence[torch.Tensor],
    probes: int,
    tell: Callable[[int], None] = lambda _done: None,
) -> list[float]:
    """Hutchinson's estimate of ``tr(H_l)`` for each tensor.

    Args:
        loss: makes the loss of ``weights``, with gradients on.
        weights: that it is differentiated by.
        probes: draws of random signs.
        tell: told of the draws done.
    """
    generator = torch.Generator().manual_seed(0)
    totals = [0.0] * len(weights)
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(), weights, create_graph=True)
        for done in range(probes):
            tell(done)
            drawn = [torch.randint(0, 2, w.shape, generator=generator, dtype=w.dtype) * 2 - 1 for w in weights]
            signs = [sign.to(weight.device) for sign, weight in zip(drawn, weights, strict=True)]
            products = torch.autograd.grad(gradients, weights, signs, retain_graph=True)
            for place, (sign, product) in enumerate(zip(signs, products, strict=True)):
                totals[place] += float((sign * product).sum()) / probes
    return totals
