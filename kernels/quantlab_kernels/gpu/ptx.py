"""The PTX of the inline-asm decodes, as text: ``tests/kernels/gpu/ptx_model.py`` runs it for every code.

Each is used in :mod:`quantlab_kernels.gpu.decode` next to the plain Triton that does the same.
"""

from __future__ import annotations

import triton

from quantlab_kernels.gpu.formats import E2M3, E3M2, INTEGER


@triton.constexpr_function
def prmt_text(result: str, entries: int) -> str:
    """PTX that looks eight codes up in a table of bytes. Codes are nibbles; ``$0..$7`` are the numbers, pair by pair.

    ``prmt`` picks four bytes out of eight by four 3-bit selectors: it is a look-up of four codes in half a table of
    bytes. Both halves are looked up and the fourth bit of each code selects. Low and high bytes are then put together.

    Args:
        result: ``upper``: as the upper half of a float32, its lower bytes the low byte again. ``subnormal``: as the
            lower half of a float32; the high byte is below 128, so that ``prmt``'s sign extension of it (selectors
            from 8) is the zero above. ``half``: as a 16-bit number.
        entries: 16, or 8 where the fourth bit of a code has no meaning.
    """
    table = [f"${9 + i}" for i in range(9)]
    lines = [
        *(".reg .b32 s, t, m, a, b, l, h;", "and.b32 s, $8, 0x77777777;"),
        *(("shr.u32 t, $8, 3;", "and.b32 t, t, 0x11111111;") if entries == 16 else ()),
    ]
    for half in range(2):
        if half:
            lines += ["shr.u32 s, s, 16;", *(["shr.u32 t, t, 16;"] if entries == 16 else [])]
        if entries == 16:
            lines.append(f"prmt.b32 m, {table[8]}, {table[8]}, t;")  # ff where the fourth bit is set
        for name, at in (("l", 0), ("h", 4)):
            if entries == 16:
                lines.append(f"prmt.b32 a, {table[at]}, {table[at + 1]}, s;")
                lines.append(f"prmt.b32 b, {table[at + 2]}, {table[at + 3]}, s;")
                lines.append(f"lop3.b32 {name}, m, b, a, 0xca;")
            else:
                lines.append(f"prmt.b32 {name}, {table[at]}, {table[at + 1]}, s;")
        if result == "half":
            for j in (0, 2):
                lines.append(f"prmt.b32 a, l, h, 0x{5 + j}{1 + j}{4 + j}{j};")
                lines.append(f"mov.b32 {{${2 * j + half}, ${2 * j + 2 + half}}}, a;")
            continue
        for j in range(4):
            picked = f"0x{4 + j}{j}{j}{j}" if result == "upper" else f"0x{12 + j:x}{12 + j:x}{4 + j}{j}"
            lines.append(f"prmt.b32 ${2 * j + half}, l, h, {picked};")
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def has_half_text(decode: int, bits: int, brain: bool) -> bool:
    """Whether :func:`half_text` can decode a format straight to 16-bit numbers."""
    if decode == INTEGER:
        return bits <= (7 if brain else 8)
    return decode in (E3M2, E2M3) and not brain


@triton.constexpr_function
def half_text(decode: int, bits: int, width: int, offset: int, zeros: bool, scales: bool, brain: bool) -> str:
    """PTX that decodes a window to 16-bit weights, two an instruction: outputs pair by pair, then window, scale, zero.

    A code is put into the mantissa of 1024 (128 in bfloat16), where its unit is 1; the number less 1024, plus the
    offset, is exact, and so is the number less an integer zero. Codes that lie higher but still within the mantissa
    are multiples of a higher unit, and the multiply-add that subtracts scales them back.
    """
    pairs = 16 // width
    count = 2 * pairs
    win, scale, zero = f"${count}", f"${count + 1}", f"${count + 1 + scales}"
    kind, mantissa = ("bf16x2", 7) if brain else ("f16x2", 10)
    lines = [".reg .b32 v, r, s, z, c, d; .reg .b16 l, h;"]
    if scales:
        lines.append(f"mov.b32 s, {{{scale}, {scale}}};")
    if zeros:
        lines.append(f"mov.b32 z, {{{zero}, {zero}}};")
    shift = 0
    lines.append(f"mov.b32 v, {win};")
    for j in range(pairs):
        at = j * width
        if decode == INTEGER:
            if at - shift + bits > mantissa:  # beyond the mantissa: move it down
                lines.append(f"shr.u32 v, {win}, {at};")
                shift = at
            mask, unit = ((1 << bits) - 1) << (at - shift), 2.0 ** (at - shift)
            magic = float(1 << mantissa)
            lines.append(f"lop3.b32 r, v, {_twice(mask)}, {_twice(_bits16(magic, brain))}, 0xea;")
            multiplier, addend = 1 / unit, offset - magic / unit
            lines.append(f"mov.b32 c, {_twice(_bits16(multiplier, brain))};")
            lines.append(f"mov.b32 d, {_twice(_bits16(addend, brain))};")
            lines.append(f"fma.rn.{kind} r, r, c, d;")
        else:
            drop = at - (8 if decode == E3M2 else 7)
            lines.append(f"{'shr' if drop >= 0 else 'shl'}.b32 r, {win}, {abs(drop)};")
            lines.append(f"and.b32 r, r, {'0x1f001f00' if decode == E3M2 else '0x0f800f80'};")
            drop = at - 10
            lines.append(f"{'shr' if drop >= 0 else 'shl'}.b32 d, {win}, {abs(drop)};")
            lines.append("lop3.b32 r, d, 0x80008000, r, 0xea;")
        if zeros:
            lines.append(f"mov.b32 c, {_twice(_bits16(-1.0, brain))};")
            lines.append(f"fma.rn.{kind} r, z, c, r;")
        if scales:
            lines.append(f"mov.b32 c, {_twice(0x8000)};")  # -0: nothing is added, not even to the sign of a zero
            lines.append(f"fma.rn.{kind} r, r, s, c;")
        lines.append(f"mov.b32 {{${2 * j}, ${2 * j + 1}}}, r;")
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def _twice(half: int) -> str:
    return f"0x{half:04x}{half:04x}"


@triton.constexpr_function
def _bits16(value: float, brain: bool) -> int:
    """The bits of a number as float16 or bfloat16, which is zero or normal, and held exactly."""
    if value == 0:
        return 0
    bias, mantissa = (127, 7) if brain else (15, 10)
    sign, value, exponent = (1, -value, 0) if value < 0 else (0, value, 0)
    while value >= 2:
        value, exponent = value / 2, exponent + 1
    while value < 1:
        value, exponent = value * 2, exponent - 1
    fraction = (value - 1) * 2**mantissa
    if fraction != int(fraction):
        raise ValueError("a constant of the decode has too many bits")
    return (sign << 15) | ((exponent + bias) << mantissa) | int(fraction)
