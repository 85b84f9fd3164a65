"""What the codes of a weight mean to the GPU kernels, and the tables that they read. Plain torch, done once at load."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# How a kernel turns codes into numbers, see :mod:`quantlab_kernels.gpu.decode`.
INTEGER, E3M2, E2M3, TABLE, TABLE16 = range(5)
DECODES = ("integer", "e3m2", "e2m3", "table", "table16")

# float16 activations are multiplied by 2^110 where codes are read as subnormal float32, multiples of 2^-149: the
# largest stays finite and the smallest product is a normal number. 2^39 makes up for the rest.
SUBNORMAL = 110
_SUBNORMAL_UNIT = 149
_FIXED_STEPS = 2**15 - 1


@dataclass(frozen=True)
class Format:
    """A weight's format.

    Attributes:
        bits: width of a code.
        decode: ``INTEGER``, ``E3M2``, ``E2M3`` (native patterns), ``TABLE`` (a look-up in memory) or ``TABLE16`` (at
            most
            16 entries, looked up in registers).
        offset: what an integer code means is ``code + offset``; 0 for other formats.
    """

    bits: int
    decode: int
    offset: int = 0

    @property
    def name(self) -> str:
        """As figures and caches call it: ``integer4``, ``e3m2``, ``table16-4``."""
        if self.decode == INTEGER:
            return f"integer{self.bits}"
        return DECODES[self.decode] + (f"-{self.bits}" if self.decode in (TABLE, TABLE16) else "")

    @classmethod
    def of(cls, bits: int, table: torch.Tensor, offset: int | None) -> Format:
        """The fastest decode that is right for a table.

        Args:
            bits: width of a code.
            table: float32 ``[<= 2**bits]``.
            offset: the table is ``code + offset``; None if it is no such thing.
        """
        if offset is not None:
            return cls(bits, INTEGER, offset)
        if bits == 6 and len(table) == 63:
            values = table.double().cpu()
            for decode, exponent, mantissa in ((E3M2, 3, 2), (E2M3, 2, 3)):
                if torch.equal(values, minifloat_table(exponent, mantissa)):
                    return cls(bits, decode)
        return cls(bits, TABLE16 if bits <= 4 else TABLE)


def minifloat_table(exponent: int, mantissa: int) -> torch.Tensor:
    """All values of a float with a sign, ascending, float64; every pattern is a number."""
    patterns = torch.arange(1 << (exponent + mantissa), dtype=torch.float64)
    power, fraction = (patterns / 2**mantissa).floor(), patterns % 2**mantissa / 2**mantissa
    bias = 2 ** (exponent - 1) - 1
    magnitudes = torch.where(power == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (power - bias))
    return torch.cat([-magnitudes[1:].flip(0), magnitudes])


@dataclass(frozen=True)
class Reading:
    """What stands between the numbers that a kernel reads out of codes, and a table's entries.

    Attributes:
        factor: an entry is ``read * input_factor * factor - fold``, see
            :func:`quantlab_kernels.gpu.decode.input_factor`.
        fold: what is subtracted, as a multiple of the sum of the activations.
        table: what the kernel is handed: int32 ``[9]`` for ``prmt``, the low bytes of entries 0-3, 4-7, 8-11, 12-15,
            then the high bytes, then a word whose bytes are 0 and 255 to make masks of; float32 for a look-up in
            memory; None where it needs no table.
        twin: float32 ``[16]``, the numbers that ``prmt`` reads, for devices that do not have it; or None.
    """

    factor: float
    fold: float = 0.0
    table: torch.Tensor | None = None
    twin: torch.Tensor | None = None

    @classmethod
    def of(cls, format: Format, table: torch.Tensor, dtype: torch.dtype, dense: bool) -> Reading:
        """How a kernel reads ``format``.

        Args:
            format: of the weight.
            table: float32 ``[<= 2**bits]``.
            dtype: of the activations, float16 or bfloat16.
            dense: whether weights are wanted in ``dtype``, for tensor cores, and not as float32.
        """
        half = dtype == torch.float16
        if format.decode == INTEGER:
            return cls(1.0) if dense or not half else cls(2.0 ** (_SUBNORMAL_UNIT - SUBNORMAL), -format.offset)
        if format.decode == TABLE16:
            return _entries(table, dtype) if dense else _fixed_point(table) if half else _upper_halves(table)
        if format.decode == TABLE:
            return cls(1.0, table=table.float())
        return cls(2.0**12 if format.decode == E3M2 else 2.0**14)


def _entries(table: torch.Tensor, dtype: torch.dtype) -> Reading:
    """Entries of 16 bits, their largest magnitude from 1 to 2."""
    values = _sixteen(table)
    factor = power_of_two(values.abs().max())
    rounded = (values / factor).to(dtype)
    bits = rounded.view(torch.int16).int()
    return Reading(float(factor), 0.0, _byte_planes(bits & 0xFF, bits >> 8), rounded.float())


_MOST = 126


def power_of_two(magnitude: torch.Tensor) -> torch.Tensor:
    """The powers of two that are not above ``magnitude``, as far as they and their inverses are float32 and normal."""
    _, exponent = torch.frexp(magnitude.float())
    exponent = torch.where(magnitude > 0, exponent - 1, -_MOST).clamp(-_MOST, _MOST)
    return torch.ldexp(torch.ones_like(magnitude, dtype=torch.float32), exponent)


def _fixed_point(table: torch.Tensor) -> Reading:
    """Entries as multiples of one step, 15 bits, read as subnormal float32: what float16 activations meet.

    The step is the table's range over 32766 and zero is a multiple, so an entry is off by at most 2^-15 of the largest
    magnitude, and zero is exact.
    """
    values = _sixteen(table).double()
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    step = (high - low) / (_FIXED_STEPS - 1) or 1.0
    offset = round(-low / step)
    fixed = (values / step).round().int() + offset
    factor = step * 2.0 ** (_SUBNORMAL_UNIT - SUBNORMAL)
    return Reading(factor, offset * step, _byte_planes(fixed & 0xFF, fixed >> 8), fixed.view(torch.float32))


def _upper_halves(table: torch.Tensor) -> Reading:
    """Entries as the upper half of a float32, 8 significant bits: what bfloat16 activations meet.

    The lower half of the number is not zero but the low byte twice more, which costs no instruction and is taken into
    account when the nearest is chosen.
    """
    values = _sixteen(table)
    top = (values.view(torch.int32) >> 16) & 0xFFFF
    candidates = torch.stack([(top + d) & 0xFFFF for d in (-1, 0, 1)])
    low = candidates & 0xFF
    bits = (candidates << 16) | (low << 8) | low
    error = torch.where(
        bits.view(torch.float32).isfinite(), bits.view(torch.float32).double() - values, torch.inf
    ).abs()
    nearest = error.argmin(0, keepdim=True)
    chosen = candidates.gather(0, nearest)[0]
    read = bits.gather(0, nearest)[0].view(torch.float32)
    return Reading(1.0, 0.0, _byte_planes(chosen & 0xFF, chosen >> 8), read)


def _sixteen(table: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(table.detach().float().cpu(), (0, 16 - len(table)))


def _byte_planes(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    words = torch.stack([low, high]).to(torch.uint8).contiguous().view(torch.int32).flatten()
    return torch.cat([words, words.new_tensor([0xFF00])])
