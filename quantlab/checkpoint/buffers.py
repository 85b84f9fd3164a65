"""Memory that weights are read into, used again for the next block's."""

from __future__ import annotations

import sys

import numpy as np
import torch

# Smaller ones come out of memory that the C library has at hand.
_LARGE = 1 << 20
# References to a buffer that nobody uses: the list's, and the argument of getrefcount.
_UNUSED = 2


class Buffers:
    """Hands out memory, and hands it out again once nobody uses it.

    A run reads tensors of the same few sizes block after block. Memory that is new to the process costs a page fault
    for every 4 KiB, which is as slow as reading.
    """

    def __init__(self) -> None:
        self._buffers: list[np.ndarray] = []

    def take(self, size: int) -> torch.Tensor:
        """uint8 ``[size]``, not initialized; it is in use for as long as a tensor shares its memory."""
        if size < _LARGE:
            return torch.empty(size, dtype=torch.uint8)
        unused = [i for i in range(len(self._buffers)) if sys.getrefcount(self._buffers[i]) == _UNUSED]
        found = next((i for i in unused if len(self._buffers[i]) == size), None)
        if found is None:
            # What nobody uses is of another size: it makes room for the new one.
            for i in reversed(unused):
                del self._buffers[i]
            self._buffers.append(np.empty(size, np.uint8))
            found = -1
        return torch.from_numpy(self._buffers[found])
