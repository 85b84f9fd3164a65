"""What a rounding method is, and the registry of all."""

from __future__ import annotations

from typing import ClassVar, Protocol

from quantlab.problem import LayerProblem, Solution, Statistic
from quantlab.recipe import Scheme
from quantlab.registry import Registry


class Quantizer(Protocol):
    """A rounding method. An implementation is a frozen dataclass whose fields are its options.

    One that rounds each output independently of the others may say so by an attribute ``rows_apart`` that is true:
    several processes then take some outputs each.
    """

    name: ClassVar[str]

    def needs(self, scheme: Scheme) -> Statistic:
        """Which statistics of the inputs :meth:`quantize` wants under this scheme."""
        ...

    def quantize(self, problem: LayerProblem, scheme: Scheme) -> Solution:
        """Choose the codes."""
        ...


QUANTIZERS: Registry[Quantizer] = Registry("quantizer")
register = QUANTIZERS.register
make_quantizer = QUANTIZERS.make
quantizer_options = QUANTIZERS.options
quantizer_names = QUANTIZERS.names
