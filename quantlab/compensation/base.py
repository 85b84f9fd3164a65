"""What a repair of the rounding error is, and the registry of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from quantlab.problem import LayerProblem, Solution, Statistic
from quantlab.recipe import Scheme
from quantlab.registry import Registry


class Rounding(Protocol):
    """A rounding method, as much of it as a repair sees: it may be asked several times, for changed weights."""

    def quantize(self, problem: LayerProblem, scheme: Scheme) -> Solution:
        """Choose the codes."""
        ...


class Compensation(Protocol):
    """A repair around a rounding method. An implementation is a frozen dataclass whose fields are its options."""

    name: ClassVar[str]

    def needs(self, scheme: Scheme) -> Statistic:
        """Which statistics of the inputs :meth:`solve` wants, beside what the rounding method wants.

        Raises:
            RecipeError: the scheme is one that the method cannot repair.
        """
        ...

    def solve(self, problem: LayerProblem, scheme: Scheme, rounding: Rounding) -> Solution:
        """Round the layer and repair it."""
        ...


@dataclass(frozen=True)
class Outlook:
    """What a repair foresees for one layer.

    Attributes:
        shape: ``(out_features, in_features)``.
        gains: what each further rank would take off the layer's relative squared error, falling.
    """

    shape: tuple[int, int]
    gains: tuple[float, ...]


@runtime_checkable
class PlansAhead(Protocol):
    """A repair that shares something among its layers, and wants to see all their weights before the run."""

    @property
    def plans_ahead(self) -> bool:
        """Whether these options leave something to be shared."""
        ...

    def foresee(self, weight: torch.Tensor, scheme: Scheme) -> Outlook:
        """Look at one layer's weight, float32 ``[out, in]``; the same for the same weight."""
        ...

    def share(self, outlooks: Mapping[str, Outlook]) -> dict[str, dict[str, Any]]:
        """Each layer's own options, from what was foreseen for all layers that have these."""
        ...


COMPENSATIONS: Registry[Compensation] = Registry("compensation")
register = COMPENSATIONS.register
make_compensation = COMPENSATIONS.make
compensation_options = COMPENSATIONS.options
compensation_names = COMPENSATIONS.names
