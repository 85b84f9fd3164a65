"""What a code can mean: a grid is a sorted table of at most 2^bits numbers.

A weight is ``(grid[code] - zero) * scale``. Every scalar format is such a table, so every rounding method
works with every format: all that it asks of one is the nearest entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True, eq=False)
class Grid:
    """A table of values, in code order.

    Attributes:
        name: what recipes call it, for example ``int4``.
        bits: width of a code.
        values: float32 ``[<= 2**bits]``, strictly ascending, on the CPU.
        ties: bool, one for each pair of neighbours: whether what lies exactly between them goes to the upper one; None
            if all go to the lower one. Floating-point formats round ties to even.
    """

    name: str
    bits: int
    values: torch.Tensor
    ties: torch.Tensor | None = None

    def __post_init__(self) -> None:
        values = self.values
        if values.dtype != torch.float32 or values.ndim != 1 or not 2 <= len(values) <= 2**self.bits:
            raise ValueError(f"{self.name}: a grid of {self.bits} bits is float32 [2..{2**self.bits}]")
        if not bool((values.diff() > 0).all()):
            raise ValueError(f"{self.name}: the values of a grid ascend strictly")

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def lowest(self) -> float:
        """The smallest value."""
        return float(self.values[0])

    @cached_property
    def highest(self) -> float:
        """The largest value."""
        return float(self.values[-1])

    @cached_property
    def extreme(self) -> float:
        """The value of largest magnitude, with its sign: where a symmetric scale puts the largest weight."""
        return self.lowest if -self.lowest >= self.highest else self.highest

    @cached_property
    def has_zero(self) -> bool:
        """Whether 0 is one of the values."""
        return bool((self.values == 0).any())

    @cached_property
    def is_integer(self) -> bool:
        """Whether the values are consecutive integers, so that rounding needs no table."""
        steps = self.values.diff()
        return bool((steps == 1).all()) and self.lowest == round(self.lowest)

    @cached_property
    def _midpoints(self) -> torch.Tensor:
        middles = (self.values[1:].double() + self.values[:-1].double()).div(2).float()
        if self.ties is None:
            return middles
        return torch.where(self.ties, torch.nextafter(middles, middles.new_tensor(-torch.inf)), middles)

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """Codes of the entries nearest to ``x``: uint8, any shape. Values beyond the ends saturate."""
        if self.is_integer:
            return self.round(x).sub_(self.lowest).to(torch.uint8)
        return torch.bucketize(x, self._midpoints.to(x.device), out_int32=True).to(torch.uint8)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """The entries nearest to ``x`` themselves: ``values[nearest(x)]``, in the dtype of ``x``."""
        if self.is_integer:
            return x.round().clamp_(self.lowest, self.highest)
        table = self.values.to(x.device, x.dtype)
        return table[torch.bucketize(x, self._midpoints.to(x.device), out_int32=True)]
