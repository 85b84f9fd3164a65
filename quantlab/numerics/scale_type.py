"""How scales are stored: as floating-point numbers, as powers of two, or as small codes under a second level."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from quantlab.errors import RecipeError


class OuterScales(NamedTuple):
    """The second level: what stored scales are multiplied by, and what is then added.

    Attributes:
        scales: float32 ``[blocks]``, one for each run of neighbouring scales (the scales' last axis runs fastest).
        offset: float32 ``[1]``, or None.
    """

    scales: torch.Tensor
    offset: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> OuterScales:
        """The same on a device."""
        return OuterScales(self.scales.to(device), None if self.offset is None else self.offset.to(device))


@dataclass(frozen=True)
class ScaleType:
    """A way to store scales.

    Attributes:
        name: what recipes call it.
        dtype: of the stored tensor.
        signed: whether a scale may be negative, which puts the longer side of a lopsided grid where it is needed.
        block: how many scales share one of the second level; 0 if there is none, -1 for all of a layer's.
        centered: whether the scales' mean is taken out first.
    """

    name: str
    dtype: torch.dtype
    signed: bool = True
    block: int = 0
    centered: bool = False

    @property
    def is_coarse(self) -> bool:
        """Whether stored scales lie so far apart that the choice between two neighbours is worth a look."""
        return self.dtype in (torch.float8_e8m0fnu, torch.float8_e4m3fn)

    @property
    def blocks_cross_layers(self) -> bool:
        """Whether a scale's stored form depends on which scales are its neighbours."""
        return self.block > 0

    def outer(self, scales: torch.Tensor) -> OuterScales | None:
        """The second level for these scales ``[rows, groups]``, float32."""
        if not self.block:
            return None
        flat = scales.float().flatten()
        offset = flat.mean().unsqueeze(0) if self.centered else None
        if offset is not None:
            flat = flat - offset
        block = self.block if self.block > 0 else flat.numel()
        largest = torch.nn.functional.pad(flat.abs(), (0, -flat.numel() % block)).view(-1, block).amax(1)
        outer = largest / _HIGHEST[self.name]
        # So that not even the smallest code times this is 0.
        return OuterScales(torch.where(outer > 0, outer.clamp(min=_SMALLEST_OUTER), 1.0), offset)

    def encode(self, scales: torch.Tensor, outer: OuterScales | None) -> torch.Tensor:
        """The stored form nearest to ``scales [rows, groups]``, which are neither zero nor infinite in it.

        A scale of 0 (a group of zeros) becomes 1, or the nearest that there is.
        """
        if outer is None:
            return _representable(scales, self.dtype)
        inner = _spread(outer.scales, scales)
        if outer.offset is not None:
            return _dynamic_codes(scales, inner, outer.offset)
        scaled = scales / inner
        if self.dtype == torch.int8:
            rounded = scaled.round().clamp(-127, 127)
            return torch.where(rounded == 0, torch.ones_like(rounded).copysign(scaled), rounded).to(torch.int8)
        return _representable(scaled, self.dtype)

    def neighbours(self, scales: torch.Tensor, outer: OuterScales | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a coarse type, the stored forms just below and just above the magnitude of ``scales``."""
        nearest = self.encode(scales, outer)
        bits = nearest.view(torch.uint8)
        # Both coarse types are ordered like their bits, their sign aside; 0 and the patterns at the end are no scales.
        sign, magnitude = (bits & 0x80, bits & 0x7F) if self.dtype == torch.float8_e4m3fn else (0, bits)
        last = 0x7E if self.dtype == torch.float8_e4m3fn else 0xFE
        beyond = decode_scales(nearest, outer).abs() > scales.abs()
        below = torch.where(beyond & (magnitude > 1), magnitude - 1, magnitude)
        above = torch.where(~beyond & (magnitude < last), magnitude + 1, magnitude)
        return (below | sign).view(self.dtype), (above | sign).view(self.dtype)


_BLOCK = 256  # scales that share one of the second level, where not all do
_TYPES = {
    known.name: known
    for known in (
        ScaleType("float32", torch.float32),
        ScaleType("float16", torch.float16),
        ScaleType("bfloat16", torch.bfloat16),
        ScaleType("e8m0", torch.float8_e8m0fnu, signed=False),  # OCP Microscaling Formats 1.0, 5.4
        ScaleType("e4m3", torch.float8_e4m3fn, signed=False, block=-1),  # NVFP4's block scales
        ScaleType("int8", torch.int8, block=_BLOCK),
        ScaleType("dynamic8", torch.uint8, signed=False, block=_BLOCK, centered=True),  # QLoRA's double quantization
    )
}
_SMALLEST_OUTER = 2.0**-116
_HIGHEST = {"e4m3": 448.0, "int8": 127.0, "dynamic8": 1.0}


def scale_type(name: str) -> ScaleType:
    """The way to store scales that recipes call ``name``.

    Raises:
        RecipeError: there is none of this name.
    """
    if not isinstance(name, str) or name not in _TYPES:
        raise RecipeError(f"scale_dtype {name!r}: use one of {', '.join(_TYPES)}")
    return _TYPES[name]


def decode_scales(stored: torch.Tensor, outer: OuterScales | None = None) -> torch.Tensor:
    """Stored scales ``[rows, groups]`` as the float32 numbers that they mean."""
    scales = dynamic_map().to(stored.device)[stored.int()] if stored.dtype == torch.uint8 else stored.float()
    if outer is None:
        return scales
    scales = scales * _spread(outer.scales, scales)
    return scales if outer.offset is None else scales + outer.offset


@cache
def dynamic_map() -> torch.Tensor:
    """The signed 8-bit "dynamic tree" table of Dettmers (arXiv:1511.04561, 2.2.3): float32 ``[256]``, ascending.

    A sign, a run of zeros that counts powers of ten, a one, and a fraction of what bits are left, which cuts
    ``0.1 .. 1`` into equal parts and stands for their middles.
    """
    values = [0.0, 1.0]
    for digits in range(7):
        edges = torch.linspace(0.1, 1, 2**digits + 1)
        middles = (edges[1:] + edges[:-1]) / 2
        middles = 10.0 ** (digits - 6) * middles
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


def _dynamic_codes(scales: torch.Tensor, inner: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The nearest codes of ``(scales - offset) / inner`` that decode to more than 0."""
    table = dynamic_map().to(scales.device)
    # As bitsandbytes has it: multiplied by the reciprocal, and halfway goes down.
    codes = torch.bucketize((scales - offset) * (1 / inner), (table[1:] + table[:-1]) / 2)
    # A scale far below the mean of the others can come out at 0 or less; the margin is float32's.
    least = torch.bucketize(-offset / inner * (1 - 1e-6), table, right=True)
    return torch.maximum(codes, least).clamp_(max=len(table) - 1).to(torch.uint8)


def _spread(outer: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Each block's number at the places of its scales: ``[rows, groups]``."""
    if outer.numel() == 1:
        return outer.to(like.device).expand_as(like)
    return outer.to(like.device).repeat_interleave(_BLOCK)[: like.numel()].view_as(like)


def _representable(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale in its stored type, never zero or infinite: a group of zeros keeps 1."""
    info = torch.finfo(dtype)
    smallest = 2.0**-9 if dtype == torch.float8_e4m3fn else info.smallest_normal
    magnitude = scale.abs().clamp(smallest, info.max)
    if dtype == torch.float8_e8m0fnu:
        return torch.where(scale == 0, torch.ones_like(scale), magnitude).to(dtype)
    return torch.where(scale == 0, torch.ones_like(scale), magnitude.copysign(scale)).to(dtype)
