"""QTensor: a quantized weight, as a rounding method leaves it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from quantlab_kernels import decode, quantizing

from quantlab.numerics.grid import Grid
from quantlab.numerics.scale import Scales
from quantlab.numerics.scale_type import OuterScales, decode_scales

# Weights that are decoded at once where not all need be held: few enough to stay in the cache.
_CHUNK = 1 << 18


@dataclass(frozen=True, eq=False)
class LowRank:
    """A correction that is added to the decoded weight: ``left @ diag(scales) @ right``.

    Attributes:
        left: ``[out, rank]``, floating-point or int8.
        right: ``[rank, in]``, of the same dtype.
        scales: float32 ``[rank]`` where the factors are int8, else None.
    """

    left: torch.Tensor
    right: torch.Tensor
    scales: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """How many columns the left factor has."""
        return self.left.shape[1]

    def scaled_left(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``left @ diag(scales)`` in ``dtype``."""
        return self.left.to(dtype) if self.scales is None else (self.left.float() * self.scales).to(dtype)

    def product(self) -> torch.Tensor:
        """The correction itself: float32 ``[out, in]``."""
        return self.scaled_left() @ self.right.float()

    def to(self, device: torch.device | str) -> LowRank:
        """The same on a device."""
        scales = None if self.scales is None else self.scales.to(device)
        return LowRank(self.left.to(device), self.right.to(device), scales)


@dataclass(frozen=True, eq=False)
class QTensor:
    """A weight ``[out, in]`` as codes, scales and an optional zero: ``(grid[code] - zero) * scale``.

    Attributes:
        codes: uint8 ``[out, in]``, indices into the grid, unpacked.
        scales: ``[out, groups]``, ``[out, 1]`` (per channel) or ``[1, 1]`` (per tensor), as stored; see
            :func:`quantlab.numerics.decode_scales`.
        zeros: like ``scales`` in units of the grid, or None (symmetric).
        grid: what the codes mean.
        low_rank: a low-rank correction, or None.
        outer: the second level of the scales, or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    grid: Grid
    low_rank: LowRank | None = None
    outer: OuterScales | None = None

    @classmethod
    def of(cls, codes: torch.Tensor, scales: Scales, grid: Grid) -> QTensor:
        """Codes with the scales that they were chosen for."""
        return cls(codes, scales.scales, scales.zeros, grid, outer=scales.outer)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.codes.shape[0], self.codes.shape[1]

    def to(self, device: torch.device | str) -> QTensor:
        """The same on a device; the grid stays where grids are."""
        return QTensor(
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            zeros=None if self.zeros is None else self.zeros.to(device),
            grid=self.grid,
            low_rank=None if self.low_rank is None else self.low_rank.to(device),
            outer=None if self.outer is None else self.outer.to(device),
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight ``[out, in]`` that the codes stand for, with the low-rank correction added."""
        table, scales = self.grid.values.to(self.codes.device), decode_scales(self.scales, self.outer)
        if self.low_rank is None:
            return decode(self.codes, scales, self.zeros, table, dtype)
        return (decode(self.codes, scales, self.zeros, table) + self.low_rank.product()).to(dtype)

    def decoded_rows(self, step: int | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
        """The decoded weight in float32, ``step`` rows at a time, for who need not hold it as a whole; None: a few."""
        table, scales = self.grid.values.to(self.codes.device), decode_scales(self.scales, self.outer)
        left = None if self.low_rank is None else self.low_rank.scaled_left()
        step = step or max(1, _CHUNK // self.shape[1])
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step)
            own = rows if len(scales) > 1 else slice(None)
            zeros = None if self.zeros is None else self.zeros[own]
            part = decode(self.codes[rows], scales[own], zeros, table)
            if self.low_rank is not None and left is not None:
                part += left[rows] @ self.low_rank.right.float()
            yield rows, part

    def row_errors(
        self, weight: torch.Tensor, importance: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Squared error and energy of each row of ``weight [out, in]``, without decoding more than a few at a time.

        Args:
            weight: what this stands for, in any dtype.
            importance: ``[in]``, what the square of an input counts; None: all alike.

        Returns:
            Two float32 ``[out]``; None where no compiled kernel does it.
        """
        if self.low_rank is not None:
            return None
        groups, scales = weight.unflatten(1, (self.scales.shape[1], -1)), decode_scales(self.scales, self.outer)
        return quantizing.row_errors(groups, self.codes, scales, self.zeros, self.grid.values, importance)

    def stored_bits(self) -> int:
        """Bits that are stored: packed codes, scales, zeros, the table, low-rank factors."""
        rows, columns = self.shape
        bits = rows * ((columns * self.grid.bits + 7) // 8) * 8
        extra = [self.scales, self.zeros, self.grid.values]
        if self.outer is not None:
            extra += [self.outer.scales, self.outer.offset]
        if self.low_rank is not None:
            extra += [self.low_rank.left, self.low_rank.right, self.low_rank.scales]
        return bits + sum(8 * t.numel() * t.element_size() for t in extra if t is not None)

    def bits_per_weight(self) -> float:
        """Everything stored, divided by the number of weights."""
        return self.stored_bits() / self.codes.numel()

    @classmethod
    def joined(cls, parts: Sequence[QTensor]) -> QTensor:
        """Tensors with the same inputs and grid one below the other, undoing :meth:`split`."""
        first = parts[0]
        zeros = None if first.zeros is None else torch.cat([part.zeros for part in parts if part.zeros is not None])
        codes, scales = torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts])
        return cls(codes, scales, zeros, first.grid, outer=first.outer)

    def split(self, rows: list[int]) -> list[QTensor]:
        """Cut along the outputs, undoing a concatenation of layers that were solved together.

        Raises:
            ValueError: the scale is shared by all rows, or the parts do not add up.
        """
        shared = self.outer is not None and self.outer.scales.numel() > 1
        if self.scales.shape[0] != self.shape[0] or self.low_rank is not None or shared:
            raise ValueError("only a tensor whose rows have scales of their own can be cut")
        if sum(rows) != self.shape[0]:
            raise ValueError(f"parts of {rows} rows do not add up to {self.shape[0]}")
        zeros = [None] * len(rows) if self.zeros is None else self.zeros.split(rows)
        parts = zip(self.codes.split(rows), self.scales.split(rows), zeros, strict=True)
        return [QTensor(codes, scales, zero, self.grid, outer=self.outer) for codes, scales, zero in parts]
