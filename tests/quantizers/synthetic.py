"""Layers made of random numbers, and what the tests of rounding methods ask of their solutions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from quantlab.numerics import Grid
from quantlab.problem import InputStatistics, LayerProblem, Solution
from quantlab.recipe import Scheme

# Like NF4: no two steps alike, more entries above zero than below.
NF4 = Grid(
    "nf4-like",
    4,
    torch.tensor([-1.0, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0]),
)


@dataclass(frozen=True)
class TableScheme(Scheme):
    """A scheme whose format is any table."""

    table: Grid = NF4

    def grid_for(self, weight: torch.Tensor, importance: torch.Tensor | None) -> Grid:
        return self.table


def inputs(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs ``[tokens, width]`` with a few strong channels, like a transformer's."""
    generator = torch.Generator().manual_seed(1000 + seed)
    latent = torch.randn(tokens, max(2, width // 4), generator=generator)
    mixing = torch.randn(latent.shape[1], width, generator=torch.Generator().manual_seed(7))
    x = latent @ mixing + 0.3 * torch.randn(tokens, width, generator=generator)
    return x * torch.linspace(-1, 1, width)[torch.randperm(width, generator=mixing_order())].mul(1.2).exp()


def mixing_order() -> torch.Generator:
    return torch.Generator().manual_seed(8)


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def statistics(x: torch.Tensor, original: torch.Tensor | None = None) -> InputStatistics:
    """The exact statistics of inputs ``x``, and of the original model's where given."""
    moment = (x.double().T @ x.double() / len(x)).float()
    shift = None
    if original is not None:
        shift = ((original.double() - x.double()).T @ x.double() / len(x)).float()
    return InputStatistics(len(x), moment, moment.diagonal().clone(), shift)


def moment_statistics(moment: torch.Tensor, tokens: int = 1000, **more) -> InputStatistics:
    return InputStatistics(tokens, moment, moment.diagonal().clone(), **more)


def problem(weight: torch.Tensor, kept: InputStatistics | None) -> LayerProblem:
    return LayerProblem("model.layers.3.mlp.down_proj", weight, kept)


def output_error(weight: torch.Tensor, solution: Solution, x: torch.Tensor) -> float:
    """``||X W^T - X Q^T||^2 / ||X W^T||^2`` in float64."""
    error = x.double() @ (weight.double() - solution.qtensor.dequantize().double()).T
    return float(error.square().sum() / (x.double() @ weight.double().T).square().sum())


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def quadratic(error: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """The diagonal of ``E H E^T``."""
    return np.array([row @ moment @ row for row in error])
