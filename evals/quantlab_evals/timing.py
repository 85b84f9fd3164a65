"""Seconds of one thing over several rounds: wall clock and processor, median and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Seconds of the same work, a round each.

    Attributes:
        wall: by the clock.
        cpu: of all threads of the process: more than ``wall`` where threads work at the same time, less where other
            processes took the processor.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @classmethod
    def of(cls, seconds: Iterable[tuple[float, float]]) -> Timing:
        """Of ``(wall, cpu)`` a round."""
        wall, cpu = zip(*seconds, strict=True)
        return cls(wall, cpu)

    @property
    def median(self) -> float:
        """Of the wall clock's seconds."""
        return statistics.median(self.wall)

    @property
    def cpu_median(self) -> float:
        """Of the processor's seconds."""
        return statistics.median(self.cpu)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the rounds took at most the first, and a quarter at least the second."""
        ordered, last = sorted(self.wall), len(self.wall) - 1
        return ordered[round(last * 0.25)], ordered[round(last * 0.75)]

    def to_dict(self) -> dict[str, Any]:
        """A JSON mapping: what was computed, and every round."""
        return {
            "median": self.median,
            "quartiles": self.quartiles,
            "minimum": min(self.wall),
            "cpu_median": self.cpu_median,
            "wall": self.wall,
            "cpu": self.cpu,
        }


def timed(work: Callable[[], T]) -> tuple[T, tuple[float, float]]:
    """What ``work`` returns, and the seconds that it took: wall clock and processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, (time.perf_counter() - wall, time.process_time() - cpu)
