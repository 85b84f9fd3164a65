"""A weight as the GPU kernels read it: made once, when a layer is loaded. Plain torch, on any device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from quantlab_kernels.gpu.formats import E2M3, E3M2, TABLE16, Format, Reading, power_of_two
from quantlab_kernels.gpu.layout import Layout, lane_width, lane_words, to_gpu_layout, window_width, windows
from quantlab_kernels.packing import pack, unpack
from quantlab_kernels.planes import to_patterns

_MOST_PLANS = 256
# Largest weights of a row that a dtype has room for, from and to, and those that are as good as zero (in float16, whose
# activations are at most 2^16, and results at least 2^-24).
_ROOM = {torch.float16: (2.0**-8, 2.0**14, 2.0**-60), torch.bfloat16: (2.0**-100, 2.0**100, 0.0)}
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_PATTERNS = {E3M2: (3, 2), E2M3: (2, 3)}


@dataclass(frozen=True)
class Kind:
    """What a kernel is compiled for, as far as the weight goes.

    Attributes:
        format: of the codes.
        layout: of the codes.
        group_units: units that have one scale; 0 if a whole row has one.
        zeros: whether groups have zeros.
    """

    format: Format
    layout: Layout
    group_units: int
    zeros: bool

    @classmethod
    def of(cls, format: Format, columns: int, groups: int, zeros: bool) -> Kind:
        """The kind of a weight of ``columns`` inputs.

        Raises:
            ValueError: the kernels have no layout for it.
        """
        layout = Layout.of(format.bits, columns, groups)
        return cls(format, layout, 0 if groups == 1 else columns // groups // layout.unit, zeros)

    def constants(self) -> dict[str, Any]:
        """The ``tl.constexpr`` arguments that GEMV and GEMM share."""
        bits = self.format.bits
        found = windows(bits)
        return {
            "BITS": bits,
            "WIDTH": window_width(bits),
            "LANE": lane_width(bits),
            "WORDS": lane_words(bits),
            # Flat: Triton before 3.7 takes no tuples of tuples.
            "PARTS": tuple(number for parts in found for part in parts for number in part),
            "PLANES": len(found[0]),
            "WINDOWS": len(found),
            "DECODE": self.format.decode,
            "OFFSET": self.format.offset,
            "UNIT_LANES": self.layout.unit_lanes,
            "GROUP_UNITS": self.group_units,
            "ZEROS": self.zeros,
        }


@dataclass(frozen=True, eq=False)
class GpuWeight:
    """A quantized weight, ready to be multiplied with.

    Attributes:
        kind: see :class:`Kind`.
        words: int32 ``[out, words, lanes]``, see :mod:`quantlab_kernels.gpu.layout`.
        scales: ``[out, groups]``, as stored.
        zeros: likewise, or None.
        table: float32 ``[<= 2**bits]``.
        powers: float32 ``[2, out]``: a power of two for each row that makes its largest weight 1 to 2, and its inverse.
        bias: ``[out]`` or None.
        low_rank: ``(left [out, rank], right [rank, in])`` or None.
    """

    kind: Kind
    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    table: torch.Tensor
    powers: torch.Tensor
    bias: torch.Tensor | None = None
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def columns(self) -> int:
        """Inputs of the layer."""
        return self.kind.layout.columns

    @property
    def out_features(self) -> int:
        """Outputs of the layer."""
        return self.words.shape[0]

    @property
    def rank(self) -> int:
        """Of the low-rank term; 0 without one."""
        return 0 if self.low_rank is None else self.low_rank[1].shape[0]

    @cached_property
    def _readings(self) -> dict[tuple[torch.dtype, bool, bool], tuple[Reading, torch.Tensor]]:
        return {}

    def reading(self, dtype: torch.dtype, dense: bool, registers: bool) -> tuple[Reading, torch.Tensor]:
        """How codes are read for activations of ``dtype``, and the table that the kernel is handed.

        Args:
            dtype: float16 or bfloat16.
            dense: see :meth:`quantlab_kernels.gpu.formats.Reading.of`.
            registers: whether a table of 16 is looked up in registers (inline asm) and not in memory.
        """
        key = (dtype, dense, registers)
        if key not in self._readings:
            reading = Reading.of(self.kind.format, self.table, dtype, dense)
            table = reading.table if registers or self.kind.format.decode != TABLE16 else reading.twin
            self._readings[key] = reading, self.words if table is None else table.to(self.words.device)
        return self._readings[key]

    @cached_property
    def plans(self) -> dict[Any, Any]:
        """How products with it are carried out, see :mod:`quantlab_kernels.gpu.plans`."""
        return {}

    def keep(self, key: Any, plan: Any) -> None:
        """Remember a plan. Who asks for products of ever other numbers of rows does not fill the memory with them."""
        if len(self.plans) >= _MOST_PLANS:
            self.plans.clear()
        self.plans[key] = plan

    @cached_property
    def _fits(self) -> dict[torch.dtype, bool]:
        return {}

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether weights can be held in ``dtype`` without loss beyond its precision. Waits for the device, once.

        Float16 has no room for a row whose largest weight is far below 1; where it is so far below that its products
        vanish, that is no loss.
        """
        if dtype not in self._fits:
            power = self.powers[1]
            low, high, vanishing = _ROOM[dtype]
            self._fits[dtype] = bool((((power >= low) & (power <= high)) | (power <= vanishing)).all())
        return self._fits[dtype]

    @cached_property
    def _factors(self) -> dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]]:
        return {}

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The low-rank term's factors in ``dtype``. Only where there is one."""
        assert self.low_rank is not None
        if dtype not in self._factors:
            left, right = self.low_rank
            self._factors[dtype] = left.to(dtype).contiguous(), right.to(dtype).contiguous()
        return self._factors[dtype]


def prepare(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    table: torch.Tensor,
    bits: int,
    offset: int | None,
    columns: int,
    bias: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    words: torch.Tensor | None = None,
) -> GpuWeight:
    """A weight as the kernels read it; arguments as in :func:`quantlab_kernels.gpu.matmul.linear`.

    Codes are re-ordered, in blocks of rows, so that at no moment is there more than a little of them unpacked. Nothing
    is dequantized.

    Args:
        words: the codes in the kernels' order, if they are known already.

    Raises:
        ValueError: the kernels have no layout for it: codes of one bit, or groups that are no multiple of a lane.
    """
    format = Format.of(bits, table, offset)
    kind = Kind.of(format, columns, scales.shape[1], zeros is not None)
    words = _reordered(codes, kind) if words is None else words
    rows = codes.shape[0]
    scales = scales.expand(rows, -1).contiguous()
    zeros = None if zeros is None else zeros.expand(rows, -1).contiguous()
    return GpuWeight(kind, words, scales, zeros, table, _powers(scales, zeros, table), bias, low_rank)


def _reordered(codes: torch.Tensor, kind: Kind) -> torch.Tensor:
    format, layout = kind.format, kind.layout
    words = torch.empty(len(codes), *layout.shape, dtype=torch.int32, device=codes.device)
    step = max(1, _BLOCK // max(layout.columns, 1))
    for first in range(0, len(codes), step):
        block = codes[first : first + step]
        if format.decode in _PATTERNS:
            patterns = to_patterns(unpack(block, format.bits, layout.columns), *_PATTERNS[format.decode])
            block = pack(patterns, format.bits)
        words[first : first + step] = to_gpu_layout(block, layout)
    return words


# Weights that are unpacked at a time: 8 bytes each for a moment.
_BLOCK = 1 << 22


def _powers(scales: torch.Tensor, zeros: torch.Tensor | None, table: torch.Tensor) -> torch.Tensor:
    largest = table.float().abs().max().to(scales.device)
    reach = largest if zeros is None else largest + zeros.float().abs()
    power = power_of_two((scales.float().abs() * reach).amax(1))
    return torch.stack([1 / power, power])
