"""How codes lie in GPU memory: 32-bit words whose halves hold neighbouring inputs, re-ordered once at load.

The dense stream of :mod:`quantlab_kernels.packing` has two faults on a GPU: codes of 3, 5, 6 and 7 bits straddle words,
and neighbouring codes of a word belong to neighbouring inputs, so that a thread which reads 16 bytes of codes reads
activations that no other load is next to. So rows are cut into **lanes**: as many weights as fill whole words of every
bit plane (4 + 2 bits for 6, 2 + 1 for 3, 4 + 2 + 1 for 7). A lane of ``b``-bit codes takes ``lane_width(b) * b`` bits
and nothing more; the words of a lane lie in separate streams, ``int32 [out, words, lanes]``, each read 128 bits (four
lanes) at a time.

Which input belongs to which bits: a **unit** is ``unit_lanes`` neighbouring lanes (at most 128 inputs, never more than
a group, so that a lane has one scale). Its inputs are laid out pair by pair: pair ``i`` of lane ``l`` is the inputs
``unit_start + i * 2 * unit_lanes + 2 * l`` and the next one. The first lies in the low half of a word, the second in
the high half, at the same place: one mask extracts both, which is the register that ``half2`` arithmetic and
tensor cores want; and four lanes of a pair are eight neighbouring inputs, one 128-bit load of activations.

Where a code has more than one plane, the pairs are numbered so that one shift and one bit-select put the upper bits
above the lower ones of four (eight) codes at once: see :func:`windows`, which the kernels follow step by step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from quantlab_kernels.packing import pack, packed_width, unpack

# Widths of a code's planes, the lowest bits first.
PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
_WORD = 32
_HALF = 16
_MOST_PER_UNIT = 128


def lane_width(bits: int) -> int:
    """How many weights a lane holds: what fills one word of the narrowest plane."""
    return _WORD // min(PLANES[bits])


def lane_words(bits: int) -> int:
    """How many 32-bit words a lane takes."""
    return lane_width(bits) * bits // _WORD


def window_width(bits: int) -> int:
    """The bits between two codes of a word once their planes are put together: 2, 4 or 8."""
    return 2 if bits == 2 else 4 if bits <= 4 else 8


class Part(NamedTuple):
    """A word's contribution to a window: ``(word >> shift) & mask``, to the left where ``shift`` is negative.

    Attributes:
        word: which of the lane's words.
        shift: by how many bits to the right.
        mask: the bits of every window that come from here, repeated over 32 bits.
    """

    word: int
    shift: int
    mask: int


def windows(bits: int) -> tuple[tuple[Part, ...], ...]:
    """How the words of a lane become windows: words that hold whole codes, ``window_width`` apart.

    Window ``w`` holds the pairs ``w * p .. w * p + p - 1`` with ``p = 16 // window_width``, from the lowest bits up.
    """
    planes, width = PLANES[bits], window_width(bits)
    count = lane_width(bits) // (_WORD // width)
    found = []
    for w in range(count):
        parts, offset, first = [], 0, 0
        for plane in planes:
            mask = _repeated(((1 << plane) - 1) << offset, width)
            per_word = width // plane  # windows that one word of this plane serves
            word, turn = divmod(w, per_word)
            # Turn 0 needs no shift; the others follow upwards and wrap around within the window.
            at = (offset + turn * plane) % width
            parts.append(Part(first + word, at - offset, mask))
            first += lane_width(bits) * plane // _WORD
            offset += plane
        found.append(tuple(parts))
    return tuple(found)


def _repeated(mask: int, width: int) -> int:
    return sum(mask << at for at in range(0, _WORD, width))


@dataclass(frozen=True)
class Layout:
    """Where the codes of a weight lie.

    Attributes:
        bits: width of a code.
        columns: inputs of the layer.
        unit_lanes: lanes of a unit.
    """

    bits: int
    columns: int
    unit_lanes: int

    @classmethod
    def of(cls, bits: int, columns: int, groups: int) -> Layout:
        """The layout of a weight of ``columns`` inputs in ``groups`` groups.

        Raises:
            ValueError: codes of this width, or groups of this size, have no such layout.
        """
        if bits not in PLANES:
            raise ValueError(f"codes of {bits} bits: the GPU kernels read 2 to 8")
        if groups < 1 or columns % groups:
            raise ValueError(f"{columns} inputs do not make {groups} equal groups")
        lane, most = lane_width(bits), _MOST_PER_UNIT
        if groups == 1:  # nothing to keep within: the least padding, then the longest units
            candidates = [cls(bits, columns, unit // lane) for unit in (most, most // 2, most // 4)]
            return min(candidates, key=lambda layout: (layout.lanes, -layout.unit_lanes))
        size = columns // groups
        if size % lane:
            raise ValueError(f"groups of {size}: {bits}-bit codes need groups that {lane} divides")
        unit = lane
        while 2 * unit <= most and size % (2 * unit) == 0:
            unit *= 2
        return cls(bits, columns, unit // lane)

    @property
    def unit(self) -> int:
        """Inputs of a unit."""
        return self.unit_lanes * lane_width(self.bits)

    @property
    def lanes(self) -> int:
        """Lanes of a row: of whole units, and of whole 128-bit loads."""
        units = -(-self.columns // self.unit)
        return -(-units * self.unit_lanes // 4) * 4

    @property
    def shape(self) -> tuple[int, int]:
        """Words and lanes: a weight is ``int32 [out, *shape]``."""
        return lane_words(self.bits), self.lanes

    def inputs(self) -> torch.Tensor:
        """The input of every weight: int64 ``[lanes, pairs, 2]``; inputs from ``columns`` on are padding."""
        lane = torch.arange(self.lanes)[:, None, None]
        pair = torch.arange(lane_width(self.bits) // 2)[None, :, None]
        within, unit = lane % self.unit_lanes, lane // self.unit_lanes
        return unit * self.unit + pair * 2 * self.unit_lanes + 2 * within + torch.arange(2)


def to_gpu_layout(codes: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Codes as the kernels read them.

    Args:
        codes: uint8 ``[out, packed_width(columns, bits)]``, dense rows as stored, on any device.
        layout: where they go.

    Returns:
        int32 ``[out, words, lanes]``: as many bytes as before, but for rows padded to whole units.
    """
    inputs = layout.inputs().to(codes.device)
    padding = (0, inputs.numel() - layout.columns)
    wide = torch.nn.functional.pad(unpack(codes, layout.bits, layout.columns), padding)
    pairs = wide[:, inputs.flatten()].view(len(codes), *inputs.shape).int()
    words = torch.zeros(len(codes), *layout.shape, dtype=torch.int32, device=codes.device)
    for pair, half, source, place, offset, mask in _moves(layout.bits):
        words[:, source] |= ((pairs[:, :, pair, half] >> offset) & mask) << place
    return words


def from_gpu_layout(words: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Undo :func:`to_gpu_layout`: uint8 ``[out, packed_width(columns, bits)]``."""
    inputs = layout.inputs().to(words.device)
    pairs = torch.zeros(len(words), *inputs.shape, dtype=torch.int32, device=words.device)
    for pair, half, source, place, offset, mask in _moves(layout.bits):
        pairs[:, :, pair, half] |= ((words[:, source] >> place) & mask) << offset
    codes = torch.empty(len(words), inputs.numel(), dtype=torch.uint8, device=words.device)
    codes[:, inputs.flatten()] = pairs.flatten(1).to(torch.uint8)
    packed = pack(codes[:, : layout.columns], layout.bits)
    assert packed.shape[1] == packed_width(layout.columns, layout.bits)
    return packed


class _Move(NamedTuple):
    pair: int
    half: int
    word: int
    place: int
    offset: int
    mask: int


def _moves(bits: int) -> list[_Move]:
    """Where each plane of each code of a lane lies: ``(code >> offset) & mask`` at bit ``place`` of ``word``."""
    width = window_width(bits)
    per_half = _HALF // width
    found = []
    for w, parts in enumerate(windows(bits)):
        offset = 0
        for plane, part in zip(PLANES[bits], parts, strict=True):
            for at in range(per_half):
                for half in range(2):
                    place = half * _HALF + at * width + offset + part.shift
                    found.append(_Move(w * per_half + at, half, part.word, place, offset, (1 << plane) - 1))
            offset += plane
    return found
