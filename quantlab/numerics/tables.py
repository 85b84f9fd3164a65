"""The tables of values that do not depend on any weight: one function a family, each returns a Grid."""

from __future__ import annotations

import torch

from quantlab.numerics.grid import Grid

# The 16 numbers of bitsandbytes, QLoRA (arXiv:2305.14314, appendix E); computed quantiles differ in the last bits.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# bitsandbytes' own FP4: not e2m1, its subnormal is tiny.
_FP4 = (0.0, 0.0052083334885537624, 0.1666666716337204, 0.25, 0.3333333432674408, 0.5, 0.6666666865348816, 1.0)


def integer(bits: int) -> Grid:
    """Two's complement integers, ``-2^(b-1) .. 2^(b-1) - 1``."""
    half = 2 ** (bits - 1)
    return Grid(f"int{bits}", bits, torch.arange(-half, half, dtype=torch.float32))


def narrow_integer(bits: int) -> Grid:
    """Integers without the lowest, ``-(2^(b-1) - 1) .. 2^(b-1) - 1``: GLM-130B's INT4 (arXiv:2210.02414)."""
    highest = 2 ** (bits - 1) - 1
    return Grid(f"int{bits}-narrow", bits, torch.arange(-highest, highest + 1, dtype=torch.float32))


def minifloat(exponent: int, mantissa: int) -> Grid:
    """A sign, ``exponent`` bits with bias ``2^(exponent-1) - 1``, and ``mantissa`` bits; rounds ties to even.

    Every pattern is a number, but where 8-bit formats have NaN and infinity (E4M3 as in OCP FP8: only the all-ones
    pattern; E5M2 as in IEEE 754: the whole highest exponent). The two zeros are one value.

    Source: OCP Microscaling Formats (MX) 1.0, 5.3; FP6-LLM (arXiv:2401.14112).
    """
    bias = 2 ** (exponent - 1) - 1
    patterns = torch.arange(2 ** (exponent + mantissa), dtype=torch.float64)
    power, fraction = (patterns / 2**mantissa).floor(), patterns % 2**mantissa / 2**mantissa
    magnitudes = torch.where(power == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (power - bias))
    if (exponent, mantissa) == (4, 3):
        magnitudes = magnitudes[:-1]
    elif (exponent, mantissa) == (5, 2):
        magnitudes = magnitudes[: -(2**mantissa)]
    # Between patterns k and k + 1 a tie goes to the even one; mirrored, the upper neighbour is the one nearer to zero.
    up = torch.arange(len(magnitudes) - 1) % 2 == 1
    values = torch.cat([-magnitudes[1:].flip(0), magnitudes]).float()
    return Grid(f"e{exponent}m{mantissa}", exponent + mantissa + 1, values, torch.cat([~up.flip(0), up]))


def normal_float(bits: int) -> Grid:
    """Quantiles of a normal distribution, with an exact zero, scaled to -1 .. 1 (QLoRA, arXiv:2305.14314, 3)."""
    if bits == 4:
        return Grid("nf4", 4, torch.tensor(_NF4))
    offset = 1 - (1 / (2 * (2**bits - 1)) + 1 / (2 * 2**bits)) / 2
    half = 2 ** (bits - 1)
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, half + 1, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, half, dtype=torch.float64)[:-1])
    values = torch.cat([negative, positive.new_zeros(1), positive.flip(0)])
    return Grid(f"nf{bits}", bits, (values / values.max()).float())


def bitsandbytes_fp4() -> Grid:
    """The 4-bit floating-point table of bitsandbytes, scaled to -1 .. 1."""
    magnitudes = torch.tensor(_FP4)
    return Grid("fp4", 4, torch.cat([-magnitudes[1:].flip(0), magnitudes]))


def power(bits: int, exponent: float) -> Grid:
    """Integers through ``sign(q) |q|^(1/a)``, scaled to end at ``+-(2^(b-1) - 1)``: uniform in ``sign(w) |w|^a``.

    Args:
        bits: width of a code.
        exponent: ``a``; 1 is the uniform grid of :func:`narrow_integer`, smaller crowds the values around zero.

    Source: PowerQuant (arXiv:2301.09858), 3.2.
    """
    highest = 2 ** (bits - 1) - 1
    q = torch.arange(-highest, highest + 1, dtype=torch.float64)
    values = highest * (q.abs() / highest).pow(1 / exponent).copysign(q)
    return Grid(f"power{bits}:{exponent:.4f}", bits, values.float())
