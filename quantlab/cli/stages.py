"""The progress of a command that does one thing after another: a spinner, or a line for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

Tell = Callable[[int, int, str], None]


@contextmanager
def stage_progress(console: Console, *, quiet: bool) -> Iterator[Tell]:
    """A function to be told of the steps done, the steps in all, and what is being done."""
    if quiet:
        yield lambda _done, _total, _what: None
    elif not console.is_terminal or console.is_dumb_terminal:
        yield _lines(console)
    else:
        with console.status("") as status:
            yield lambda done, total, what: status.update(_line(done, total, what))


def _lines(console: Console) -> Tell:
    """What has been said once is not said again."""
    said: set[str] = set()

    def tell(done: int, total: int, what: str) -> None:
        if what not in said:
            said.add(what)
            console.print(_line(done, total, what), soft_wrap=True)

    return tell


def _line(done: int, total: int, what: str) -> Text:
    return Text(f"{done + 1} of {total}: {what}" if done < total else what, style="dim")
