"""What a person sees of a run while it works: a live display on a terminal, else plain lines; and a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

import psutil
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from quantlab.cli.show import clock, describe_calibration, number, scheme_name, size
from quantlab.cli.tracker import Tracker

if TYPE_CHECKING:
    from quantlab.engine.progress import Start
    from quantlab.engine.report import LayerReport

# The same note (but for its numbers) is told of so many layers; the summary counts them all.
_TOLD_NOTES = 3
_RECENT = 5


class Writer:
    """One place where a run is shown; does nothing of itself."""

    def open(self, tracker: Tracker) -> None:
        """The command begins."""

    def started(self, tracker: Tracker) -> None:
        """Everything is checked, work begins."""

    def entered(self, tracker: Tracker) -> None:
        """A block begins."""

    def layer(self, tracker: Tracker, report: LayerReport) -> None:
        """A layer is done."""

    def warn(self, warning: str) -> None:
        """Something that a person should know."""

    def block_done(self, tracker: Tracker, block: str) -> None:
        """A block is done."""

    def close(self, tracker: Tracker, error: BaseException | None) -> None:
        """The command ends."""


class Watch:
    """A run's progress (``quantlab.engine.progress.Progress``), shown in several places."""

    def __init__(self, what: str, writers: Iterable[Writer]) -> None:
        self.tracker = Tracker(what)
        self._writers = list(writers)
        self._told: dict[str, int] = {}

    def __enter__(self) -> Watch:
        for writer in self._writers:
            writer.open(self.tracker)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers:
            writer.close(self.tracker, error)

    def start(self, start: Start) -> None:
        """Everything is checked, work begins."""
        self.tracker.begin(start)
        for writer in self._writers:
            writer.started(self.tracker)
            for note in start.notes:
                writer.warn(note)

    def block(self, name: str) -> None:
        """A block begins, and the one before it is done."""
        self._block_done(self.tracker.enter(name))
        for writer in self._writers:
            writer.entered(self.tracker)

    def layer(self, report: LayerReport) -> None:
        """A layer is done."""
        self.tracker.reports.append(report)
        for writer in self._writers:
            writer.layer(self.tracker, report)
        for note in report.notes:
            kind = note_kind(note)
            self._told[kind] = self._told.get(kind, 0) + 1
            if self._told[kind] <= _TOLD_NOTES:
                more = "; more layers are counted in the summary" if self._told[kind] == _TOLD_NOTES else ""
                for writer in self._writers:
                    writer.warn(f"{report.layer}: {note}{more}")

    def finish(self) -> None:
        """The result is in its place."""
        self._block_done(self.tracker.leave())

    def interrupted(self) -> str:
        """How to go on after Ctrl-C."""
        tracker = self.tracker
        if tracker.start is None:
            return "interrupted before the first block; nothing was written"
        if not tracker.done:
            return "interrupted in the first block; run the same command again to start anew"
        if tracker.done >= tracker.total:
            return "interrupted after the last block; run the same command again to finish"
        return (
            f"interrupted; {tracker.done} of {tracker.total} blocks are done and kept: run the same command "
            f"again to go on at block {tracker.done + 1}"
        )

    def _block_done(self, block: str | None) -> None:
        if block is not None:
            for writer in self._writers:
                writer.block_done(self.tracker, block)


class Lines(Writer):
    """One line a block."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def open(self, tracker: Tracker) -> None:
        """The command begins."""
        self._line(f"{tracker.what}: reading the model")

    def started(self, tracker: Tracker) -> None:
        """Everything is checked, work begins."""
        for line in _opening(tracker):
            self._line(line)

    def warn(self, warning: str) -> None:
        """Something that a person should know."""
        self._line(f"note: {warning}")

    def block_done(self, tracker: Tracker, block: str) -> None:
        """A block is done."""
        self._line(_block_line(tracker, block))

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class Log(Lines):
    """One line a layer and one a block, with the time, appended to a file."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)

    @classmethod
    def append_to(cls, file: Path) -> Log:
        """A log that goes on where the file ends.

        Raises:
            QuantlabError: it cannot be written.
        """
        from quantlab.errors import QuantlabError

        try:
            return cls(open(file, "a", encoding="utf-8"))
        except OSError as error:
            raise QuantlabError(f"--log {file}: cannot be written ({error.strerror}); choose another file") from error

    def layer(self, tracker: Tracker, report: LayerReport) -> None:  # noqa: ARG002
        """A layer is done."""
        self._line(
            f"{report.layer}: {scheme_name(report)} {report.quantizer}, "
            f"{report.bits:.2f} bits, {report.metric} error {number(report.error)}, {report.tokens} tokens, "
            f"{report.seconds or 0:.1f} s"
        )

    def close(self, tracker: Tracker, error: BaseException | None) -> None:
        """The command ends."""
        said = " ".join(str(error).split()) if error else ""
        ended = f"stopped by {type(error).__name__}: {said}" if said else f"stopped by {type(error).__name__}"
        self._line(ended if error else f"done in {clock(tracker.elapsed)}")
        self._stream.close()

    def _line(self, text: str) -> None:
        super()._line(f"{datetime.now().isoformat(sep=' ', timespec='seconds')} {text}")


class Screen(Writer):
    """A live display on a terminal, once the work begins; until then a download may show its own."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None

    def open(self, tracker: Tracker) -> None:
        """The command begins."""
        self._console.print(Text(f"{tracker.what}: reading the model", style="dim"))

    def started(self, tracker: Tracker) -> None:
        """Everything is checked, work begins."""
        for line in _opening(tracker):
            self._console.print(Text(line))
        self._live = Live(
            console=self._console,
            get_renderable=lambda: _display(tracker, self._console.width),
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
        )
        self._live.start()

    def warn(self, warning: str) -> None:
        """Something that a person should know."""
        self._console.print(Text("note: ", style="yellow") + Text(warning, style="default"))

    def close(self, tracker: Tracker, error: BaseException | None) -> None:  # noqa: ARG002
        """The command ends."""
        if self._live is not None:
            self._live.stop()


def _display(tracker: Tracker, width: int) -> RenderableType:
    """How far the run is, and the last layers."""
    assert tracker.start is not None
    at = min(tracker.done + 1, tracker.total)
    bar = Table.grid(padding=(0, 2, 0, 0))
    bar.add_row(
        Text(f"block {at} of {tracker.total}", style="bold"),
        ProgressBar(total=1, completed=tracker.share, width=max(10, min(40, width - 40))),
        f"{tracker.share:.0%}",
    )
    left = tracker.remaining()
    figures = [
        f"{clock(tracker.elapsed)} elapsed",
        "time left: after this block" if left is None else f"about {clock(left)} left",
        f"{size(psutil.Process().memory_info().rss)} of memory",
    ]
    if tokens := tracker.start.calibration.get("tokens"):
        figures.append(f"{tokens:,} tokens")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, overflow="ellipsis")
    for _ in range(3):
        table.add_column(justify="right", no_wrap=True)
    for report in tracker.reports[-_RECENT:]:
        scheme = scheme_name(report)
        table.add_row(report.layer, scheme, number(report.error), f"{report.seconds or 0:.1f} s")
    now = tracker.next_layer() or tracker.block or "outside the blocks"
    table.add_row(now, "", "", "...", style="cyan")
    return Group(bar, Text(" · ".join(figures), style="dim"), table)


def stderr_console() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False)


def peak_memory() -> int:
    """The most bytes that this process has held at any time; on some systems, what it holds now."""
    try:
        import resource
    except ImportError:  # Windows
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def writers(console: Console, *, quiet: bool, log: Path | None) -> Iterator[Writer]:
    """The places where a run is shown: the screen or plain lines, and the log."""
    if not quiet:
        on_screen = console.is_terminal and not console.is_dumb_terminal
        yield Screen(console) if on_screen else Lines(sys.stderr)
    if log is not None:
        yield Log.append_to(log)


def note_kind(note: str) -> str:
    """A note without its numbers: what makes two of them the same."""
    return "".join("#" if letter.isdigit() else letter for letter in note)


def _opening(tracker: Tracker) -> Iterator[str]:
    """What is about to be done."""
    start = tracker.start
    assert start is not None
    ways = f", each quantized in {start.variants} ways" if start.variants > 1 else ""
    yield f"{tracker.what}: {len(start.plan)} layers in {tracker.total} blocks{ways}"
    for line in describe_calibration(start.calibration):
        yield f"calibration: {line}"
    if resumed := len([block for block in start.resumed if block]):
        yield f"an interrupted run did {resumed} of {tracker.total} blocks: going on at block {resumed + 1}"


def _block_line(tracker: Tracker, block: str) -> str:
    reports = [report for report in tracker.reports if report.block == block]
    parts = [f"block {tracker.done} of {tracker.total} {block}"]
    if reports:
        worst = max(reports, key=lambda report: report.error)
        mean = sum(report.error for report in reports) / len(reports)
        name = worst.layer.removeprefix(block + ".")
        layers = len({report.layer for report in reports})
        parts.append(f"{layers} layers, error mean {number(mean)}, worst {number(worst.error)} ({name})")
    left = tracker.remaining()
    times = [f"{tracker.seconds(block):.1f} s", f"{clock(tracker.elapsed)} elapsed"]
    times += [f"about {clock(left)} left"] if left is not None and tracker.done < tracker.total else []
    return ": ".join([*parts[:1], ", ".join([*parts[1:], *times, size(psutil.Process().memory_info().rss)])])
