"""Hooks on modules that are gone when their context is left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end, and, of ``handles`` that are still being made when one fails, those that there are.

    Args:
        handles: what ``register_forward_hook`` and its like return.
    """
    with ExitStack() as removed:
        for handle in handles:
            removed.enter_context(handle)
        yield
