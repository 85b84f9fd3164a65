"""How far a run is, and how long the rest takes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantlab.engine.progress import Start
    from quantlab.engine.report import LayerReport


class Tracker:
    """Where a run is, and how long the rest takes, judged by the blocks that were done in this run.

    Attributes:
        what: the run in words.
        began: when, by ``time.perf_counter``.
        start: what is to be done; None until everything is checked.
        block: the block at work, or "" for what is outside the blocks.
        reports: one for each layer done in this run.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.began = time.perf_counter()
        self.start: Start | None = None
        self.block = ""
        self.reports: list[LayerReport] = []
        self._weights: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        self._since = self.began

    def begin(self, start: Start) -> None:
        """Work begins."""
        self.start = start
        for layer in start.plan.values():
            weights = layer.shape[0] * layer.shape[1] * start.variants
            self._weights[layer.block] = self._weights.get(layer.block, 0) + weights

    def enter(self, block: str) -> str | None:
        """The next block begins; the block that is thereby done, if it was done in this run."""
        done = self.leave()
        self.block, self._since = block, time.perf_counter()
        return done

    def leave(self) -> str | None:
        """The block is done; its name, if it was done in this run."""
        assert self.start is not None
        block = self.block
        if not block or block in self.start.resumed or block in self._seconds:
            return None
        self._seconds[block] = time.perf_counter() - self._since
        return block

    @property
    def total(self) -> int:
        """Blocks of the model."""
        return len(self.start.architecture.blocks) if self.start else 0

    @property
    def done(self) -> int:
        """Blocks done, by this run or by an interrupted one before it."""
        return len([block for block in self.start.resumed if block]) + len(self._seconds) if self.start else 0

    @property
    def share(self) -> float:
        """The share of the weights to be quantized that are done, 0 to 1."""
        resumed = sum(self._weights.get(block, 0) for block in self.start.resumed) if self.start else 0
        done = resumed + sum(report.shape[0] * report.shape[1] for report in self.reports)
        return done / max(1, sum(self._weights.values()))

    @property
    def elapsed(self) -> float:
        """Seconds since the command began."""
        return time.perf_counter() - self.began

    def seconds(self, block: str) -> float:
        """How long a block took that was done in this run."""
        return self._seconds[block]

    def remaining(self) -> float | None:
        """Seconds that the rest takes at the pace of the blocks done in this run; None before the first."""
        paced = sum(self._weights.get(block, 0) for block in self._seconds)
        if self.start is None or not paced:
            return None
        resumed = sum(self._weights.get(block, 0) for block in self.start.resumed)
        left = sum(self._weights.values()) - resumed - paced
        at_work = time.perf_counter() - self._since if self.block not in self._seconds else 0.0
        return max(0.0, left * sum(self._seconds.values()) / paced - at_work)

    def next_layer(self) -> str | None:
        """The layer at work, as far as the plan tells."""
        done = {report.layer for report in self.reports}
        planned = self.start.plan.values() if self.start else ()
        return next((layer.name for layer in planned if layer.block == self.block and layer.name not in done), None)
