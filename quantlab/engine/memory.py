"""What the C library does with freed memory."""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """Give freed memory back to the system, where the C library keeps it (glibc): a run by blocks fragments it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
