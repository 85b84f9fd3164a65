"""What a code can mean: a grid is a sorted table of at most 2^bits numbers.

A weight is ``(grid[code] - zero) * scale``. Every scalar format is such a table, so every rounding method
works with every format: all that it asks of one is the nearest entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

# Cells that a grid's range may be cut into for a quick look-up: more would not stay in the cache.
_CELLS = (64, 256, 1024, 4096)


class _Cells(NamedTuple):
    """A grid's range cut into equal cells, none of which holds more than one border between two codes.

    Attributes:
        start: where the first cell begins.
        per_unit: cells in an interval of length 1.
        code: int32 ``[cells]``, the code of what lies in a cell and not above its border.
        border: float32 ``[cells]``, the border, or infinity.
    """

    start: float
    per_unit: float
    code: torch.Tensor
    border: torch.Tensor

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The cell of each number: int32. It never falls where ``x`` grows, which is all that it must be right in."""
        last = len(self.code) - 1
        return ((x - self.start) * self.per_unit).clamp_(0, last).int().clamp_(0, last)  # again: NaN is no cell


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

    @property
    def borders(self) -> torch.Tensor | None:
        """Float32, one fewer than values: what lies above border i has a code above i. None: integers, ties to even."""
        return None if self.is_integer else self._midpoints

    @cached_property
    def _midpoints(self) -> torch.Tensor:
        middles = (self.values[1:].double() + self.values[:-1].double()).div(2).float()
        if self.ties is None:
            return middles
        return torch.where(self.ties, torch.nextafter(middles, middles.new_tensor(-torch.inf)), middles)

    @cached_property
    def _cells(self) -> _Cells | None:
        borders = self._midpoints
        first, last = float(borders[0]), float(borders[-1])
        for count in _CELLS:
            if count < len(borders) or not first < last < float("inf"):
                continue
            empty = torch.full((count,), torch.inf)
            cells = _Cells(first, count / (last - first), torch.zeros(count, dtype=torch.int32), empty)
            at = cells.of(borders).long()
            if len(at.unique()) == len(borders):
                cells.border[at] = borders
                # As many codes lie below a cell as borders lie in the cells before it.
                cells.code[1:] = cells.border.isfinite().cumsum(0)[:-1].int()
                return cells
        return None

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """Codes of the entries nearest to ``x``: uint8, any shape. Values beyond the ends saturate."""
        if self.is_integer:
            return self.round(x).sub_(self.lowest).to(torch.uint8)
        return self._codes(x).to(torch.uint8).view(x.shape)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """The entries nearest to ``x`` themselves: ``values[nearest(x)]``, in the dtype of ``x``."""
        if self.is_integer:
            return x.round().clamp_(self.lowest, self.highest)
        return self.values.to(x.device, x.dtype).index_select(0, self._codes(x)).view(x.shape)

    def _codes(self, x: torch.Tensor) -> torch.Tensor:
        """Codes: int32, flat."""
        x = (x if x.dtype == torch.float64 else x.float()).flatten()
        cells = self._cells
        if cells is None:
            return torch.bucketize(x, self._midpoints.to(x.device), out_int32=True)
        # A search for each number takes eight times as long as looking up its cell and comparing once.
        cell = cells.of(x)
        above = x > cells.border.to(x.device).index_select(0, cell)
        return cells.code.to(x.device).index_select(0, cell).add_(above)
