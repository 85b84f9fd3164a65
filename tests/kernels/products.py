"""Random quantized layers, and their products in float64 with the error that rounding may cause."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from quantlab_kernels import pack, unpack


@dataclass(frozen=True)
class Layer:
    """The arguments of a product, without the activations."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    table: torch.Tensor
    bits: int
    bias: torch.Tensor | None
    low_rank: tuple[torch.Tensor, torch.Tensor] | None
    columns: int

    @property
    def arguments(self):
        return self.codes, self.scales, self.zeros, self.table, self.bits, self.bias, self.low_rank

    def weight(self) -> torch.Tensor:
        """float64 ``[out, in]``, without the low-rank term."""
        codes = unpack(self.codes, self.bits, self.columns)
        rows, groups = codes.shape[0], self.scales.shape[1]
        values = self.table.double()[codes.long()].view(rows, groups, -1)
        if self.zeros is not None:
            values = values - self.zeros.double().unsqueeze(-1)
        return (values * self.scales.float().double().unsqueeze(-1)).flatten(1)

    def product(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The product in float64, and how large its terms are: errors are a part of that."""
        x, weight = x.double(), self.weight()
        # With zeros a kernel sums table entries and zeros apart.
        spread = weight.abs()
        if self.zeros is not None:
            plain = Layer(self.codes, self.scales, None, self.table, self.bits, None, None, self.columns)
            spread = spread + 2 * plain.weight().abs()
        y, size = x @ weight.T, x.abs() @ spread.T
        if self.low_rank is not None:
            left, right = (factor.double() for factor in self.low_rank)
            y, size = y + x @ right.T @ left.T, size + x.abs() @ right.abs().T @ left.abs().T
        if self.bias is not None:
            y, size = y + self.bias.double(), size + self.bias.double().abs()
        return y, size

    def assert_right(self, y: torch.Tensor, x: torch.Tensor, *, rounds_weights: bool = False) -> None:
        """``y`` is the product with ``x``: rounded once, after sums in float32.

        Args:
            rounds_weights: whether weights (or the table) are rounded to the activations' type too.
        """
        expected, size = self.product(x)
        assert y.dtype == x.dtype
        assert y.shape == expected.shape
        finfo = torch.finfo(x.dtype)
        allowed = finfo.eps / 2 * expected.abs() + max(finfo.eps if rounds_weights else 0, 2.0**-18) * size
        allowed += 2 * finfo.tiny * finfo.eps  # a result that is subnormal
        error = (y.double() - expected).abs()
        right = (error <= allowed) | (expected.abs() > finfo.max * (1 - finfo.eps))
        assert right.all(), (error / size)[~right].max()


def random_layer(
    bits=4,
    rows=24,
    columns=256,
    groups=4,
    *,
    integers=True,
    zeros=None,
    scale_rows=None,
    scale_dtype=torch.bfloat16,
    table_size=None,
    bias=False,
    rank=0,
    factor_dtype=torch.bfloat16,
    seed=0,
) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    size = table_size or 2**bits
    codes = torch.randint(0, size, (rows, columns), generator=generator).to(torch.uint8)
    shape = (scale_rows or rows, groups)
    scales = torch.rand(shape, generator=generator) + 0.1
    if scale_dtype == torch.float8_e8m0fnu:
        scales = torch.exp2(torch.randint(-8, 1, shape, generator=generator).float())
    table = torch.arange(size) - size // 2 if integers else torch.randn(size, generator=generator).sort().values * 3
    factors = None
    if rank:
        left, right = (
            torch.randint(-9, 10, shape, generator=generator).to(factor_dtype)
            for shape in ((rows, rank), (rank, columns))
        )
        factors = (left, right)
    offsets = None if zeros is None else torch.randint(-4, 5, shape, generator=generator).to(zeros)
    bias = torch.randn(rows, generator=generator) if bias else None
    return Layer(pack(codes, bits), scales.to(scale_dtype), offsets, table.float(), bits, bias, factors, columns)


def activations(rows, columns, dtype=torch.bfloat16, seed=1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
