"""From bits to numbers, inside a kernel. Every function here is called by kernels and can only run in one.

A decode gives the two weights of a pair (:mod:`quantlab_kernels.gpu.layout`) as float32 tensors that are the weights
but for factors which are powers of two and are cheaper to apply elsewhere: ``weight = decoded * input_factor *
factor``, where ``input_factor`` depends on the place of the pair in its window and is multiplied to the activations
once for all rows of weights, and ``factor`` is multiplied to the scales. Both are exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantlab_kernels.gpu.formats import E2M3, E3M2, INTEGER, SUBNORMAL, TABLE16
from quantlab_kernels.gpu.ptx import half_text, has_half_text, prmt_text

_INTEGER = tl.constexpr(INTEGER)
_E3M2 = tl.constexpr(E3M2)
_E2M3 = tl.constexpr(E2M3)
_TABLE16 = tl.constexpr(TABLE16)


@triton.jit
def load(pointers, live):
    """Numbers, or zeros where ``live`` is false; without a mask if it is None."""
    if live is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=live, other=0.0)


@triton.jit
def load_words(pointers, live, stride, WORDS: tl.constexpr):
    """The words of a tile of lanes: a tuple of uint32 tensors, ``stride`` lanes apart in memory."""
    words = ()
    for q in tl.static_range(WORDS):
        if live is None:
            word = tl.load(pointers + q * stride, eviction_policy="evict_first")
        else:
            word = tl.load(pointers + q * stride, mask=live, other=0, eviction_policy="evict_first")
        words += (word.to(tl.uint32, bitcast=True),)
    return words


@triton.jit
def shifted(word, SHIFT: tl.constexpr):
    """``word`` shifted to the right, or to the left where ``SHIFT`` is negative."""
    if SHIFT > 0:
        return word >> SHIFT
    elif SHIFT < 0:
        return word << -SHIFT
    else:
        return word


@triton.jit
def window(words, W: tl.constexpr, PARTS: tl.constexpr, PLANES: tl.constexpr):
    """Window ``W`` of a lane: whole codes, and bits of no meaning between them. ``PARTS``: see ``layout.windows``."""
    own: tl.constexpr = W * PLANES * 3
    found = shifted(words[PARTS[own]], PARTS[own + 1])
    # Each further plane fills all that the ones before it left: a bit-select is one instruction, and a code is masked
    # out of the window anyway.
    if PLANES > 1:
        keep: tl.constexpr = PARTS[own + 2]
        found = (found & keep) | (shifted(words[PARTS[own + 3]], PARTS[own + 4]) & (0xFFFFFFFF ^ keep))
    if PLANES > 2:
        both: tl.constexpr = PARTS[own + 2] | PARTS[own + 5]
        found = (found & both) | (shifted(words[PARTS[own + 6]], PARTS[own + 7]) & (0xFFFFFFFF ^ both))
    return found


@triton.constexpr_function
def place(bits, width, index, half):
    """At which bit :func:`integer_bits` leaves a code."""
    if half == 0:
        return index * width
    if index == 0 and bits < 8:
        return 16
    return 0 if index * width + bits == 16 else index * width


@triton.jit
def integer_bits(win, BITS: tl.constexpr, WIDTH: tl.constexpr, INDEX: tl.constexpr, HALF: tl.constexpr):
    """A code alone in a word, at :func:`place`: below bit 23, so that it fits into the mantissa of a float32.

    One instruction for each code, and one shift for each window: the first of the upper half is low enough as it lies,
    and the last of it needs no mask but the shift.
    """
    MASK: tl.constexpr = (1 << BITS) - 1
    if HALF == 0 or (INDEX == 0 and BITS < 8):
        return win & (MASK << (INDEX * WIDTH + 16 * HALF))
    elif INDEX * WIDTH + BITS == 16:
        return win >> (32 - BITS)
    else:
        return (win >> 16) & (MASK << (INDEX * WIDTH))


@triton.jit
def integer_value(bits, magic, AT: tl.constexpr, OFFSET: tl.constexpr):
    """``(code + OFFSET) * 2^AT``, exactly: the code goes into the mantissa of ``magic``, 2^23, which is subtracted.

    ``magic`` is an argument of the kernel and no constant: an instruction has room for one constant, the mask.
    """
    return (bits | magic).to(tl.float32, bitcast=True) - (8388608.0 - OFFSET * 2.0**AT)


HALVES = tl.constexpr("{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }")


@triton.jit
def as_halves(bits, ASM: tl.constexpr):
    """The two float16 numbers of a 32-bit word, the lower one first, as float32."""
    if ASM:  # without it the upper half is moved down first
        return tl.inline_asm_elementwise(HALVES, "=f,=f,r", [bits], (tl.float32, tl.float32), is_pure=True, pack=1)
    else:
        low = (bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        high = (bits >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
        return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def e3m2_halves(win, AT: tl.constexpr):
    """Two e3m2 patterns at ``AT`` of either half as float16 times ``2^-12``: exponent and mantissa end at bit 8."""
    magnitude = shifted(win, AT - 8) & 0x1F001F00
    return magnitude | (shifted(win, AT - 10) & 0x80008000)


@triton.jit
def e2m3_halves(win, AT: tl.constexpr):
    """Two e2m3 patterns at ``AT`` of either half as float16 times ``2^-14``: exponent and mantissa end at bit 7."""
    magnitude = shifted(win, AT - 7) & 0x0F800F80
    return magnitude | (shifted(win, AT - 10) & 0x80008000)


_FLOATS = tl.constexpr(",".join(["=f"] * 8 + ["r"] * 10))
_HALVES = tl.constexpr(",".join(["=h"] * 8 + ["r"] * 10))


@triton.jit
def register_lookup(nibbles, table, SUBNORMAL_RESULT: tl.constexpr, SIXTEEN: tl.constexpr):
    """Eight codes looked up in a table of ``Reading``: float32, pair by pair."""
    return tl.inline_asm_elementwise(
        prmt_text("subnormal" if SUBNORMAL_RESULT else "upper", 16 if SIXTEEN else 8),
        _FLOATS,
        [nibbles, table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7], table[8]],
        dtype=(tl.float32,) * 8,
        is_pure=True,
        pack=1,
    )


@triton.jit
def entry_lookup(nibbles, table, DTYPE: tl.constexpr, SIXTEEN: tl.constexpr):
    """The same of entries of 16 bits: ``DTYPE``, pair by pair."""
    return tl.inline_asm_elementwise(
        prmt_text("half", 16 if SIXTEEN else 8),
        _HALVES,
        [nibbles, table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7], table[8]],
        dtype=(DTYPE.value,) * 8,
        is_pure=True,
        pack=1,
    )


NO_LANE = tl.constexpr("{ .reg .b32 l; mov.u32 l, %laneid; and.b32 $0, l, $1; }")


@triton.jit
def load_table(pointer, magic, DECODE: tl.constexpr, ASM: tl.constexpr):
    """What a kernel holds of a table: nine words for ``prmt``, or where the float32 entries lie."""
    if DECODE == _TABLE16 and ASM:
        # Zero, which the compiler can't know: what it knows to be the same for all threads it keeps in uniform
        # registers,
        # and copies from there for each use, one instruction a weight.
        zero = tl.inline_asm_elementwise(NO_LANE, "=r,r", [magic], tl.int32, is_pure=True, pack=1)
        words = ()
        for i in tl.static_range(9):
            words += (tl.load(pointer + i + zero),)
        return words
    else:
        return pointer


@triton.constexpr_function
def input_factor(decode, scaled, bits, width, index, half):
    """What the activations that meet a code are multiplied with: a power of two that depends on :func:`place`."""
    if decode == INTEGER:
        return 2.0 ** ((SUBNORMAL if scaled else 0) - place(bits, width, index, half))
    return 2.0**SUBNORMAL if decode == TABLE16 and scaled else 1.0


@triton.jit
def values(win, table, magic, DECODE: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, SCALED: tl.constexpr,
           OFFSET: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """The numbers of a window, pair by pair: a tuple of ``32 / WIDTH`` float32 tensors.

    Args:
        win: uint32, see :func:`window`.
        table: see :func:`load_table`.
        magic: see :func:`integer_value`.
        SCALED: the activations are float16. Codes of integers are then read as they lie, as subnormal numbers: no
            arithmetic at all, but the activations have to be multiplied by 2^110, which bfloat16 has no room for.
    """
    MASK: tl.constexpr = (1 << BITS) - 1
    found = ()
    if DECODE == _INTEGER:
        for j in tl.static_range(16 // WIDTH):
            near, far = integer_bits(win, BITS, WIDTH, j, 0), integer_bits(win, BITS, WIDTH, j, 1)
            if SCALED:
                found += (near.to(tl.float32, bitcast=True), far.to(tl.float32, bitcast=True))
            else:
                found += (
                    integer_value(near, magic, place(BITS, WIDTH, j, 0), OFFSET),
                    integer_value(far, magic, place(BITS, WIDTH, j, 1), OFFSET),
                )
    elif DECODE == _E3M2:
        for j in tl.static_range(16 // WIDTH):
            found += as_halves(e3m2_halves(win, j * WIDTH), ASM)
    elif DECODE == _E2M3:
        for j in tl.static_range(16 // WIDTH):
            found += as_halves(e2m3_halves(win, j * WIDTH), ASM)
    elif DECODE == _TABLE16 and ASM:
        if WIDTH == 4:
            found = register_lookup(win, table, SCALED, BITS == 4)
        else:
            even = register_lookup(win & 0x33333333, table, SCALED, False)
            odd = register_lookup((win >> 2) & 0x33333333, table, SCALED, False)
            for j in tl.static_range(4):
                found += (even[2 * j], even[2 * j + 1], odd[2 * j], odd[2 * j + 1])
    else:
        for j in tl.static_range(16 // WIDTH):
            low = tl.load(table + ((win >> (j * WIDTH)) & MASK))
            found += (low, tl.load(table + ((win >> (16 + j * WIDTH)) & MASK)))
    return found


@triton.constexpr_function
def _half_constraints(pairs, zeros, scales):
    return ",".join(["=h"] * (2 * pairs) + ["r"] + ["h"] * (zeros + scales))


@triton.jit
def weights(
    win, scale, zero, table, magic, DTYPE: tl.constexpr, DECODE: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr,
    OFFSET: tl.constexpr, ZEROS: tl.constexpr, SCALES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The weights of a window in ``DTYPE``, pair by pair: ``(read - zero) * scale``, with what codes are read as.

    Args:
        scale: in ``DTYPE`` of the shape of ``win``, applied if ``SCALES``.
        zero: likewise, if ``ZEROS``.
    """
    found = ()
    BRAIN: tl.constexpr = DTYPE == tl.bfloat16  # noqa: SIM300 (a dtype doesn't know how to compare itself to a constant)
    if ASM and has_half_text(DECODE, BITS, BRAIN):
        TEXT: tl.constexpr = half_text(DECODE, BITS, WIDTH, OFFSET, ZEROS, SCALES, BRAIN)
        inputs = (win,)
        if SCALES:
            inputs += (scale,)
        if ZEROS:
            inputs += (zero,)
        found = tl.inline_asm_elementwise(
            TEXT,
            _half_constraints(16 // WIDTH, ZEROS, SCALES),
            inputs,
            dtype=(DTYPE.value,) * (32 // WIDTH),
            is_pure=True,
            pack=1,
        )
    elif DECODE == _TABLE16 and ASM:
        if WIDTH == 4:
            read = entry_lookup(win, table, DTYPE, BITS == 4)
        else:
            even = entry_lookup(win & 0x33333333, table, DTYPE, False)
            odd = entry_lookup((win >> 2) & 0x33333333, table, DTYPE, False)
            read = ()
            for j in tl.static_range(4):
                read += (even[2 * j], even[2 * j + 1], odd[2 * j], odd[2 * j + 1])
        for i in tl.static_range(32 // WIDTH):
            value = read[i]
            if ZEROS:
                value -= zero
            if SCALES:
                value *= scale
            found += (value,)
    else:
        read = values(win, table, magic, DECODE, BITS, WIDTH, False, OFFSET, ASM)
        for i in tl.static_range(32 // WIDTH):
            value = read[i] * (input_factor(DECODE, False, BITS, WIDTH, i // 2, i % 2))
            if ZEROS:
                value -= zero.to(tl.float32)
            if SCALES:
                value *= scale.to(tl.float32)
            found += (value.to(DTYPE),)
    return found
