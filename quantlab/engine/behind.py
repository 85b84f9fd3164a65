"""Work that waits for the disk, done behind the back of what computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Behind:
    """Calls functions on a thread of its own, one at a time and in order.

    A call waits for the one before, so no more than one is under way, and what that one raised is raised there. Leaving
    the ``with`` block waits for the last; what it raised is raised unless something else is on its way already.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "quantlab-behind")
        self._last: Future[None] | None = None

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self._wait()

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have ``function(*arguments)`` called."""
        self._wait()
        self._last = self._pool.submit(function, *arguments)

    def _wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()
