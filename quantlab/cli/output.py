"""Where words go: the answer to standard output, everything else to standard error; and the exit codes.

0: done. 1: a bug (with a traceback). 2: bad input. 130: Ctrl-C. 141: nobody reads the answer any more.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.text import Text

BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
# Where lines are not for a screen they are as long as they have to be.
_UNBOUNDED = 10_000


@dataclass
class Output:
    """One command's words. While it is entered, whatever a library prints goes to standard error.

    The answer is printed on leaving. Leaving by an error that a person can do something about prints that
    error and ends the command with exit code 2.

    Attributes:
        json: the answer, or the error, is one JSON document.
        quiet: no answer for a person.
        on_interrupt: what to say after Ctrl-C.
    """

    json: bool = False
    quiet: bool = False
    on_interrupt: Callable[[], str] = lambda: "interrupted"
    _answer: tuple[Any, tuple[RenderableType, ...]] | None = field(default=None, init=False)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False)

    def answer(self, document: Any, *words: RenderableType) -> None:
        """What the command found: ``document`` for a program, ``words`` for a person."""
        self._answer = (document, words)

    def __enter__(self) -> Output:
        self._stack.enter_context(_stdout_to_stderr())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if isinstance(error, KeyboardInterrupt):
            say_error(self.on_interrupt(), "Interrupted", json=self.json, label="")
            raise typer.Exit(INTERRUPTED) from error
        if error is not None and is_bad_input(error):
            say_error(str(error), type(error).__name__, json=self.json)
            raise typer.Exit(BAD_INPUT) from error
        if isinstance(error, Exception) and not isinstance(error, typer.Exit) and self.json:
            print_json({"error": str(error), "kind": type(error).__name__})  # and its traceback follows
        if error is None and self._answer is not None:
            self._print(*self._answer)

    def _print(self, document: Any, words: tuple[RenderableType, ...]) -> None:
        try:
            if self.json:
                print_json(document)
            elif not self.quiet:
                console = answer_console()
                with console.capture() as printed:  # rich would end the program where the pipe is closed
                    for word in words:
                        console.print(word, soft_wrap=isinstance(word, Text))  # text stays as it stands
                sys.stdout.write(printed.get())
            sys.stdout.flush()
        except BrokenPipeError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter would complain when it flushes
            raise typer.Exit(BROKEN_PIPE) from error


def is_bad_input(error: BaseException) -> bool:
    """Whether an error speaks of the input, and not of a bug."""
    from quantlab.errors import QuantlabError

    evals = sys.modules.get("quantlab_evals.errors")  # what was never imported raised nothing
    return isinstance(error, QuantlabError) or (evals is not None and isinstance(error, evals.EvalError))


def say_error(message: str, kind: str, *, json: bool, label: str = "error: ") -> None:
    """One paragraph on standard error, or one JSON document on standard output."""
    message = " ".join(message.split())
    if json:
        print_json({"error": message, "kind": kind})
    else:
        console = Console(stderr=True, highlight=False)
        paragraph = Text.assemble((label, "bold red"), message)
        console.print(paragraph, soft_wrap=not console.is_terminal)


def print_json(document: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def answer_console() -> Console:
    """Standard output: as wide as the terminal, or as the lines need if it is none."""
    console = Console(highlight=False)
    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console = Console(highlight=False, width=_UNBOUNDED)
    return console


def quiet_libraries(*, progress_bars: bool) -> None:
    """Keep what transformers and the hub's client say of themselves off the screen; call it first.

    A download's progress bar stays where a person is looking, on standard error.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    if not progress_bars:
        disable_progress_bars()


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send standard output to standard error, from Python and from C."""
    sys.stdout.flush()
    try:
        saved = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # no such descriptor: there is nothing to protect
        saved = None
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


def _plain(value: Any) -> Any:
    """``value`` in JSON's own types; numbers that JSON does not have become null."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
