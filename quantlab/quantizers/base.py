"""What a rounding method is, and the registry of all."""

from __future__ import annotations

from typing import ClassVar, Protocol

from quantlab.problem import LayerProblem, Solution, Statistic
from quantlab.recipe import Scheme
from quantlab.registry import Registry


class Quantizer(Protocol):
    """A rounding method. An implementation is a frozen dataclass whose fields are its options.

    Attributes that are true say more of one. ``rows_apart``: it rounds each output independently of the others, so
    several processes may take some outputs each. ``any_dtype``: it takes weights as they are stored, not in float32,
    and leaves them as they are; no copy of them is made then.
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
