"""What ``gpu_check`` and ``gpu_speed`` multiply with: random layers of every format that is shipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quantlab_kernels.packing import pack

if TYPE_CHECKING:
    from quantlab_kernels.gpu.weight import GpuWeight

_NF4 = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0)
_NF4_UP = (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0)


@dataclass(frozen=True)
class Subject:
    """A format as a stored layer has it.

    Attributes:
        name: of the format.
        bits: width of a code.
        offset: of an integer format, or None.
        entries: of the table.
        zeros: whether groups have zeros.
    """

    name: str
    bits: int
    offset: int | None
    entries: tuple[float, ...]
    zeros: bool = False

    @property
    def table(self) -> torch.Tensor:
        """Float32."""
        return torch.tensor(self.entries)


def subjects() -> Iterator[Subject]:
    """Everything that is shipped, by what a checkpoint would hold."""
    from quantlab_kernels.gpu.formats import minifloat_table

    for bits in range(2, 9):
        for zeros in (False, True):
            lowest = -(1 << (bits - 1))
            name = f"int{bits}" + ("-zeros" if zeros else "")
            yield Subject(name, bits, lowest, tuple(map(float, range(lowest, -lowest))), zeros)
    for name, exponent, mantissa in (("e3m2", 3, 2), ("e2m3", 2, 3)):
        yield Subject(name, 6, None, tuple(minifloat_table(exponent, mantissa).tolist()))
    yield Subject("nf4", 4, None, _NF4 + _NF4_UP)
    curve = torch.linspace(-1, 1, 63, dtype=torch.float64)
    yield Subject("power6", 6, None, tuple((curve.sign() * curve.abs() ** 2.5).tolist()))


@dataclass(frozen=True)
class Tensors:
    """A random layer of a subject, as stored."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    weight: torch.Tensor  # float64, what they mean

    @classmethod
    def random(cls, subject: Subject, rows: int, columns: int, group: int, device: torch.device) -> Tensors:
        """``[rows, columns]`` of uniform codes."""
        generator = torch.Generator().manual_seed(0)
        table = subject.table
        codes = torch.randint(0, len(table), (rows, columns), generator=generator).to(torch.uint8)
        scales = (torch.rand(rows, columns // group, generator=generator) + 0.1) / 64
        zeros = torch.randint(-2, 3, scales.shape, generator=generator).to(torch.int8) if subject.zeros else None
        values = table.double()[codes.long()].unflatten(1, (-1, group))
        if zeros is not None:
            values = values - zeros.double().unsqueeze(-1)
        weight = (values * scales.double().unsqueeze(-1)).flatten(1)
        stored = pack(codes, subject.bits), scales.half(), zeros
        exact = weight * (scales.half().double() / scales.double()).repeat_interleave(group, 1)
        return cls(*(None if t is None else t.to(device) for t in (*stored, exact)))  # type: ignore[arg-type]

    def prepared(self, subject: Subject) -> GpuWeight:
        """As the kernels read it."""
        from quantlab_kernels.gpu import prepare

        columns = self.weight.shape[1]
        return prepare(self.codes, self.scales, self.zeros, subject.table, subject.bits, subject.offset, columns)
