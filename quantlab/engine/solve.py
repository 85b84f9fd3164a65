"""Solve the layers that share one input: stack what can be stacked, hand it to the quantizer, report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch

from quantlab.engine.report import LayerReport
from quantlab.errors import CheckpointError
from quantlab.numerics import QTensor
from quantlab.quantizers import InputStatistics, LayerProblem, Quantizer, Statistic, make_quantizer
from quantlab.recipe import Scheme


@dataclass(frozen=True)
class PlannedLayer:
    """A layer, the scheme that the recipe gives it, and the method that will carry it out."""

    name: str
    block: str
    shape: tuple[int, int]
    scheme: Scheme
    quantizer: Quantizer

    @property
    def needs(self) -> Statistic:
        """What the method wants to be kept of the layer's inputs."""
        return self.quantizer.needs(self.scheme)


def plan_layer(name: str, block: str, shape: tuple[int, int], scheme: Scheme) -> PlannedLayer:
    """Resolve a layer's quantizer.

    Raises:
        RecipeError: the scheme names a method or an option that does not exist.
    """
    return PlannedLayer(name, block, shape, scheme, make_quantizer(scheme.quantizer, scheme.options))


def solve(
    layers: Iterable[PlannedLayer], weights: Mapping[str, torch.Tensor], statistics: InputStatistics | None
) -> list[tuple[QTensor, LayerReport]]:
    """Quantize layers that share their input.

    Layers of one scheme are stacked along their outputs and solved as one, which costs one factorization and one pass.

    Args:
        layers: what to do.
        weights: by layer name, ``[out, in]`` in any dtype.
        statistics: of the shared input, or None if no layer needs any.

    Returns:
        For each layer, in order, its quantized weight and its report.
    """
    layers = list(layers)
    _check_finite(layers, weights, statistics)
    answers = []
    for scheme, members in groupby(layers, key=lambda layer: layer.scheme):
        stack = list(members)
        stacks = [[layer] for layer in stack] if scheme.granularity == "tensor" else [stack]
        for part in stacks:
            answers += _solve_stack(part, [weights[layer.name].float() for layer in part], statistics)
    return answers


def _check_finite(
    layers: list[PlannedLayer], weights: Mapping[str, torch.Tensor], statistics: InputStatistics | None
) -> None:
    for layer in layers:
        if not weights[layer.name].isfinite().all():
            raise CheckpointError(
                f"{layer.name}: its weight holds NaN or infinity; the checkpoint is damaged, or overflowed when it was "
                "converted to float16: get it again, or keep this layer as it is with format none"
            )
    if statistics is not None and statistics.diagonal is not None and not statistics.diagonal.isfinite().all():
        names = ", ".join(layer.name for layer in layers)
        raise CheckpointError(
            f"{names}: the inputs that the calibration data make are not finite; the model overflows in "
            f"{weights[layers[0].name].dtype}: convert it to bfloat16 or float32 first"
        )


def _solve_stack(
    layers: list[PlannedLayer], weights: list[torch.Tensor], statistics: InputStatistics | None
) -> list[tuple[QTensor, LayerReport]]:
    started = time.perf_counter()
    stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
    problem = LayerProblem(" + ".join(layer.name for layer in layers), stacked, statistics)
    solution = layers[0].quantizer.quantize(problem, layers[0].scheme)
    rows = [len(weight) for weight in weights]
    qtensors = [solution.qtensor] if len(layers) == 1 else solution.qtensor.split(rows)
    losses, energies, metric = _row_errors(stacked, solution.qtensor, solution.loss, statistics)
    seconds = (time.perf_counter() - started) / len(layers)
    answers = []
    for layer, qtensor, loss, energy in zip(layers, qtensors, losses.split(rows), energies.split(rows), strict=True):
        report = LayerReport(
            layer=layer.name,
            block=layer.block,
            quantizer=layer.scheme.quantizer,
            format=layer.scheme.format,
            granularity=layer.scheme.granularity,
            shape=qtensor.shape,
            bits=qtensor.bits_per_weight(),
            bytes=qtensor.stored_bits() // 8,
            error=float(loss.sum() / energy.sum().clamp(min=torch.finfo(torch.float32).tiny)),
            metric=metric,
            tokens=statistics.tokens if statistics else 0,
            notes=solution.notes,
            seconds=seconds,
        )
        answers.append((qtensor, report))
    return answers


def _row_errors(
    weight: torch.Tensor, qtensor: QTensor, loss: torch.Tensor | None, statistics: InputStatistics | None
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Squared error and energy of each output, and the metric that they are in: the best that is known."""
    if statistics is not None and statistics.tokens and statistics.second_moment is not None:
        moment = statistics.second_moment
        if loss is None:
            error = weight - qtensor.dequantize()
            loss = ((error @ moment) * error).sum(1)
        return loss, ((weight @ moment) * weight).sum(1), "output"
    error = (weight - qtensor.dequantize()).square_()
    if statistics is not None and statistics.tokens and statistics.diagonal is not None:
        return error @ statistics.diagonal, weight.square() @ statistics.diagonal, "weighted"
    return error.sum(1), weight.square().sum(1), "weight"
