"""Layers made of random numbers, with inputs that look like a transformer's, and their statistics."""

from __future__ import annotations

import torch

from quantlab.numerics import QTensor
from quantlab.problem import InputStatistics, LayerProblem
from quantlab.recipe import Scheme


def autoregressive(tokens: int, width: int, rho: float, generator: torch.Generator) -> torch.Tensor:
    """Rows whose neighbouring entries correlate: AR(1) with unit variance, float64."""
    noise = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    x = noise.clone()
    for i in range(1, width):
        x[:, i] = rho * x[:, i - 1] + (1 - rho**2) ** 0.5 * noise[:, i]
    return x


def outlier_layer(tokens: int = 4096, rows: int = 128, width: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight of Student's t with 4 degrees of freedom, and inputs: AR(0.9), plus rank 8, five channels times 10.5."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(5, rows, width, generator=generator, dtype=torch.float64)
    weight = 0.02 * normal[0] / normal[1:].square().mean(0).sqrt()
    x = autoregressive(tokens, width, 0.9, generator)
    latent = torch.randn(tokens, 8, generator=generator, dtype=torch.float64)
    x += 0.7 * latent @ torch.randn(8, width, generator=generator, dtype=torch.float64)
    x[:, torch.randperm(width, generator=generator)[:5]] *= 10.5
    return weight.float(), x


def statistics(x: torch.Tensor, sequences: int = 8) -> InputStatistics:
    """Everything that can be kept of inputs ``[tokens, in]``, exactly."""
    x = x.double()
    moment = x.T @ x / len(x)
    magnitude = x.unflatten(0, (sequences, -1)).abs().mean(1).amax(0)
    return InputStatistics(
        len(x), moment.float(), moment.diagonal().float(), mean=x.mean(0).float(), magnitude=magnitude.float()
    )


def problem(weight: torch.Tensor, kept: InputStatistics | None) -> LayerProblem:
    return LayerProblem("model.layers.3.mlp.down_proj", weight, kept)


def output_energy(error: torch.Tensor, x: torch.Tensor) -> float:
    """``||X E^T||^2`` in float64."""
    return float((x.double() @ error.double().T).square().sum())


def metric_energy(error: torch.Tensor, moment: torch.Tensor) -> float:
    """``tr(E M E^T)`` in float64."""
    return float(((error.double() @ moment.double()) * error.double()).sum())


def left(weight: torch.Tensor, qtensor: QTensor) -> torch.Tensor:
    return weight.double() - qtensor.dequantize().double()


THREE_BITS = Scheme(format="int3", granularity="channel", symmetric=False, scale_search="absmax", scale_dtype="float32")
