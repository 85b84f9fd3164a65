"""The progress of a command that does many things of one kind: a bar, or a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from quantlab.cli.show import clock


@contextmanager
def count_progress(console: Console, unit: str, what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A function to be told of what is done and what there is in all: a bar, or a line now and then.

    Args:
        console: where it is shown.
        unit: what is counted: ``"window"``.
        what: what the command is at, for the line before the first one is done.
        quiet: show nothing.
    """
    if quiet:
        yield lambda _done, _total: None
        return
    console.print(Text(f"{what}: reading the text and loading", style="dim"), soft_wrap=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield _count_lines(console, unit)
        return
    columns = (TextColumn(unit + " {task.completed} of {task.total}"), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, TextColumn("{task.description}"), console=console, transient=True)
    task = bar.add_task("elapsed", start=False)
    pace = _Pace()

    def tell(done: int, total: int) -> None:
        _, left = pace.after(done, total)
        bar.update(task, completed=done, total=total, description=f"elapsed, about {clock(left)} left")
        if done == 1:  # a download may have shown its own bar until here
            bar.start_task(task)
            bar.start()

    try:
        yield tell
    finally:
        bar.stop()


def _count_lines(console: Console, unit: str) -> Callable[[int, int], None]:
    pace = _Pace()

    def tell(done: int, total: int) -> None:
        elapsed, left = pace.after(done, total)
        # Ten lines in all, however many there are.
        if done == total or done * 10 // total > (done - 1) * 10 // total:
            console.print(
                f"{unit} {done} of {total}, {clock(elapsed)} elapsed, about {clock(left)} left",
                soft_wrap=True,
            )

    return tell


class _Pace:
    """Seconds gone and seconds left, of a pass that may be followed by another."""

    def __init__(self) -> None:
        self._began = self._latest = time.perf_counter()
        self._done = 0

    def after(self, done: int, total: int) -> tuple[float, float]:
        if done <= self._done:
            self._began = self._latest
        self._done, self._latest = done, time.perf_counter()
        elapsed = self._latest - self._began
        return elapsed, elapsed / done * (total - done)
