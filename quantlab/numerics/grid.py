"""What a code can mean: a grid is a sorted table of at most 2^bits numbers.

A weight is ``(grid[code] - zero) * scale``. Every scalar format is such a table, so every rounding method
works with every format: all that it asks of one is the nearest entry.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from quantlab.errors import RecipeError


@dataclass(frozen=True, eq=False)
class Grid:
    """A table of values, in code order.

    Attributes:
        name: what recipes call it, for example ``int4``.
        bits: width of a code.
        values: float32 ``[<= 2**bits]``, strictly ascending, on the CPU.
    """

    name: str
    bits: int
    values: torch.Tensor

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
    def is_integer(self) -> bool:
        """Whether the values are consecutive integers, so that rounding needs no table."""
        steps = self.values.diff()
        return bool((steps == 1).all()) and self.lowest == round(self.lowest)

    @cached_property
    def _midpoints(self) -> torch.Tensor:
        return (self.values[1:].double() + self.values[:-1].double()).div(2).float()

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


def integer(bits: int) -> Grid:
    """Two's complement integers, ``-2^(b-1) .. 2^(b-1) - 1``."""
    half = 2 ** (bits - 1)
    return Grid(f"int{bits}", bits, torch.arange(-half, half, dtype=torch.float32))


# A format family: a pattern of the name, and the function that turns its match into a grid.
_FAMILIES: list[tuple[re.Pattern[str], Callable[[re.Match[str]], Grid]]] = [
    (re.compile(r"int([2-8])"), lambda match: integer(int(match[1]))),
]
_EXAMPLES = [f"int{bits}" for bits in range(2, 9)]
_CACHE: dict[str, Grid] = {}


def grid(name: str) -> Grid:
    """The grid that a recipe calls ``name``.

    Raises:
        RecipeError: no format has this name.
    """
    if name not in _CACHE:
        for pattern, make in _FAMILIES:
            if match := pattern.fullmatch(name):
                _CACHE[name] = make(match)
                break
        else:
            raise RecipeError(f"format {name!r} is unknown; use one of {', '.join(_EXAMPLES)}")
    return _CACHE[name]
