"""What a kernel makes of a stored weight at its first product, kept for the next ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch

T = TypeVar("T")


class _Entry(NamedTuple, Generic[T]):
    codes: weakref.ref[torch.Tensor]
    version: int
    given: tuple[torch.Tensor | None, ...]
    made: T


class Kept(Generic[T]):
    """What was made of codes, beside them for as long as they live; made again when they were written to."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry[T]] = {}

    def of(self, codes: torch.Tensor, given: tuple[torch.Tensor | None, ...], make: Callable[[T | None], T]) -> T:
        """What was made of these codes and these very tensors, or what ``make`` makes now.

        Args:
            codes: its lifetime is that of the result.
            given: the other tensors that the result depends on.
            make: is handed what was made of the same codes with other tensors, or None.
        """
        key, version = id(codes), 0 if codes.is_inference() else codes._version
        entry = self._entries.get(key)
        before = None
        if entry is not None and entry.codes() is codes and entry.version == version:
            if len(entry.given) == len(given) and all(a is b for a, b in zip(entry.given, given, strict=True)):
                return entry.made
            before = entry.made
        made = make(before)
        gone = weakref.ref(codes, lambda _: self._entries.pop(key, None))
        self._entries[key] = _Entry(gone, version, given, made)
        return made
