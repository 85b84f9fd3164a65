"""A model of the PTX that the inline-asm decodes use, written from the PTX ISA manual; halves are exact fractions."""

from __future__ import annotations

import re
import struct
from fractions import Fraction

_WORD = 0xFFFFFFFF


def run(text: str, outputs: int, inputs: list[int], lane: int = 0) -> list[int]:
    """Execute a block. ``$0`` up to ``outputs - 1`` are its results, the next ones ``inputs``; all as bit patterns."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)} | {"%laneid": lane}
    body = text.strip().removeprefix("{").removesuffix("}")
    # Braces hold lists of registers: no statement ends inside them.
    for statement in filter(None, (part.strip() for part in body.split(";"))):
        name, _, operands = statement.partition(" ")
        if name != ".reg":
            _execute(name, [o.strip() for o in re.findall(r"\s*\{[^}]*\}|[^,]+", operands)], registers)
    return [registers[f"${i}"] for i in range(outputs)]


def _execute(name: str, operands: list[str], registers: dict[str, int]) -> None:
    target, *sources = operands

    def value(operand: str) -> int:
        if operand.startswith("{"):
            low, high = operand.strip("{}").split(",")
            return registers[low.strip()] | registers[high.strip()] << 16
        return registers[operand] if operand in registers else int(operand, 0) & _WORD

    values = [value(source) for source in sources]
    result = OPERATIONS[name](*values)
    if target.startswith("{"):
        low, high = target.strip("{}").split(",")
        registers[low.strip()], registers[high.strip()] = result & 0xFFFF, result >> 16
    else:
        registers[target] = result


def prmt(a: int, b: int, selector: int) -> int:
    """PTX ISA, prmt, default mode: four bytes of {b, a}; a selector's highest bit repeats the sign of the byte."""
    found = 0
    for i in range(4):
        choice = selector >> (4 * i) & 0xF
        byte = (b << 32 | a) >> (8 * (choice & 7)) & 0xFF
        found |= (0xFF * (byte >> 7) if choice & 8 else byte) << (8 * i)
    return found


def lop3(a: int, b: int, c: int, table: int) -> int:
    """Any function of three bits: bit ``a * 4 + b * 2 + c`` of ``table``."""
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))


def round_half(exact: Fraction, sign: int, mantissa: int, exponent: int) -> int:
    """A number in a 16-bit format, ties to even, subnormal numbers kept; ``sign`` is that of a zero."""
    bias, sign = (1 << (exponent - 1)) - 1, int(exact < 0) if exact else sign
    magnitude, power = abs(exact), 1 - bias
    while magnitude >= Fraction(2) ** (power + 1):
        power += 1
    units = round(magnitude / Fraction(2) ** (power - mantissa))  # Python rounds ties to even
    bits = units + (power + bias - 1 << mantissa)  # a carry moves into the exponent by itself
    return sign << 15 | min(bits, (1 << exponent) - 1 << mantissa)


def half_value(bits: int, mantissa: int, exponent: int) -> Fraction:
    """What a 16-bit pattern means; infinities and NaN are no part of the model."""
    bias, power = (1 << (exponent - 1)) - 1, bits >> mantissa & (1 << exponent) - 1
    assert power != (1 << exponent) - 1, "not finite"
    fraction = Fraction(bits & (1 << mantissa) - 1, 1 << mantissa)
    magnitude = fraction * Fraction(2) ** (1 - bias) if power == 0 else (1 + fraction) * Fraction(2) ** (power - bias)
    return -magnitude if bits >> 15 else magnitude


def _fma2(mantissa: int, exponent: int):
    def one(a: int, b: int, c: int) -> int:
        x, y, z = (half_value(bits, mantissa, exponent) for bits in (a, b, c))
        # A sum of zeros is positive unless both are negative.
        sign = (a ^ b) >> 15 & c >> 15
        return round_half(x * y + z, sign, mantissa, exponent)

    def both(a: int, b: int, c: int) -> int:
        return one(a & 0xFFFF, b & 0xFFFF, c & 0xFFFF) | one(a >> 16, b >> 16, c >> 16) << 16

    return both


def _float_of_half(bits: int) -> int:
    return struct.unpack("<I", struct.pack("<f", struct.unpack("<e", struct.pack("<H", bits))[0]))[0]


OPERATIONS = {
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "shr.b32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b & _WORD,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "fma.rn.f16x2": _fma2(10, 5),
    "fma.rn.bf16x2": _fma2(7, 8),
    "cvt.f32.f16": _float_of_half,
}
