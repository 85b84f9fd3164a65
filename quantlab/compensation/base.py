"""What a repair of the rounding error is, and the registry of all."""

from __future__ import annotations

from typing import ClassVar, Protocol

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


COMPENSATIONS: Registry[Compensation] = Registry("compensation")
register = COMPENSATIONS.register
make_compensation = COMPENSATIONS.make
compensation_options = COMPENSATIONS.options
compensation_names = COMPENSATIONS.names
