"""The number formats that recipes can name: their values, what they cost, and when to use them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from quantlab.numerics import OuterScales, QTensor, Sample, format_called, scale_type

# A format, its family, and when to use it. Families have more widths than are listed.
_LISTED = (
    ("int2", "int", "Two bits, and every trick there is: with small groups, learned rounding and a repair beside it."),
    ("int3", "int", "Memory is what counts. With GPTQ; the loss is visible below a few billion weights."),
    ("int4", "int", "The default of four bits: fast on every machine, close with GPTQ in groups of 64."),
    ("int4-narrow", "int", "To reproduce GLM-130B, or where a kernel wants integers that are symmetric."),
    ("int6", "int", "Six bits where only integers are fast; e2m3 is closer at the same size."),
    ("int8", "int", "Half the size for next to nothing, one scale a row."),
    ("e2m1", "float", "Hardware that multiplies it: MXFP4 (32 weights under e8m0), NVFP4 (16 under e4m3)."),
    ("e2m2", "float", "Five bits with one scale a row."),
    ("e2m3", "float", "Six bits, close to lossless with one scale a row, on ordinary weights."),
    ("e3m2", "float", "Six bits under coarse scales and wild outliers: the same relative error for all sizes."),
    ("e4m3", "float", "Eight bits for hardware with FP8; MXFP8 in blocks of 32 under e8m0."),
    ("e5m2", "float", "Eight bits of which range is what counts; e4m3 is closer for weights."),
    ("nf3", "table", "Three bits on weights that are normally distributed within a group."),
    ("nf4", "table", "Four bits as QLoRA stores them; adapters can be trained on top."),
    ("fp4", "table", "To reproduce bitsandbytes' FP4; nf4 or e2m1 are closer."),
    ("power4", "fitted", "Four bits with one scale a row: the exponent is fitted to each layer."),
    ("codebook3", "fitted", "Three bits, each of the eight values fitted to the layer."),
    (
        "codebook4",
        "fitted",
        "Four bits, each of the sixteen values fitted to the layer.",
    ),
)
# What shares a scale, and how scales are stored there as a rule.
_USUAL = (
    ("16, e4m3", 16, "e4m3"),
    ("32, e8m0", 32, "e8m0"),
    ("32, bfloat16", 32, "bfloat16"),
    ("64, bfloat16", 64, "bfloat16"),
    ("64, dynamic8", 64, "dynamic8"),
    ("channel, float16", 4096, "float16"),
)
_SIZE = 4096  # rows and columns of the weight that costs are counted for


@dataclass(frozen=True)
class DescribedFormat:
    """A number format as it is listed.

    Attributes:
        name: what recipes call it.
        family: int, float, table, or fitted (to each layer; its values here are fitted to a normal distribution).
        bits: width of a code.
        values: in code order.
        bits_per_weight: of a weight ``[4096, 4096]``, everything counted, by what shares a scale and how it is stored.
        use: when to use it.
    """

    name: str
    family: str
    bits: int
    values: tuple[float, ...]
    bits_per_weight: dict[str, float]
    use: str

    @property
    def normalized(self) -> tuple[float, ...]:
        """The values divided by the largest magnitude."""
        largest = max(map(abs, self.values))
        return tuple(value / largest for value in self.values)

    def to_dict(self) -> dict[str, Any]:
        """A JSON mapping."""
        return {
            "name": self.name,
            "family": self.family,
            "bits": self.bits,
            "lowest": self.values[0],
            "highest": self.values[-1],
            "values": list(self.values),
            "bits_per_weight": self.bits_per_weight,
            "use": self.use,
        }


def formats() -> list[DescribedFormat]:
    """The number formats that recipes can name, one or a few of each family."""
    normal = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    return [_described(name, family, use, normal) for name, family, use in _LISTED]


def _described(name: str, family: str, use: str, normal: torch.Tensor) -> DescribedFormat:
    table = format_called(name).grid_for(Sample(normal, "channel"))
    costs = {}
    for label, size, stored in _USUAL:
        kind = scale_type(stored)
        count = _SIZE * _SIZE // size
        outer = None
        if kind.block:
            blocks = 1 if kind.block < 0 else -(-count // kind.block)
            outer = OuterScales(torch.empty(blocks, device="meta"), torch.empty(1, device="meta"))
            outer = outer if kind.centered else OuterScales(outer.scales)
        codes = torch.empty(_SIZE, _SIZE, dtype=torch.uint8, device="meta")
        scales = torch.empty(_SIZE, _SIZE // size, dtype=kind.dtype, device="meta")
        costs[label] = round(QTensor(codes, scales, None, table, outer=outer).bits_per_weight(), 3)
    return DescribedFormat(name, family, table.bits, tuple(table.values.tolist()), costs, use)
