"""`quantlab verify`: does a quantized model load as it will be loaded, and say what was quantized?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantlab.cli.options import Json, Quiet, Threads, prepare
from quantlab.cli.output import Output

if TYPE_CHECKING:
    from quantlab.verification import Verification

EXAMPLES = (
    "Examples:\n\n"
    "  quantlab verify demo-w4\n"
    "  quantlab verify demo-w4 --against demo\n"
    "  quantlab verify demo-ct --against demo-w4\n\n"
    "Exit code 2 if something is wrong."
)
_MARKS = {True: "ok", False: "WRONG", None: "--"}


def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that quantlab wrote or exported, or a .gguf file.")
    ],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="For an exported model what it came from; for another the original."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Load and run it there, too: cuda, cuda:1, or auto: a GPU if any.")
    ] = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Load a quantized model in a process of its own and check it: tensors, recipe, predictions."""
    with Output(as_json, quiet) as output:
        prepare(threads, quiet=True)
        checked_ = checked(folder, against, device)
        output.answer(checked_.to_dict(), *lines(checked_))


def checked(folder: Path, against: str | None = None, device: str = "cpu") -> Verification:
    """The verification of a model.

    Raises:
        VerificationError: something is wrong with it.
    """
    from quantlab.errors import VerificationError
    from quantlab.verification import verify as run

    done = run(folder, against, device)
    if not done.passed:
        raise VerificationError(f"{folder}: {done.failure}")
    return done


def lines(done: Verification) -> Iterator[str]:
    """A line a check."""
    yield f"{done.path}"
    for check in done.checks:
        yield f"  {_MARKS[check.passed]:<6}{check.name}{f': {check.detail}' if check.detail else ''}"


def summary(done: Verification) -> Iterator[str]:
    """One line of all checks."""
    passed = sum(check.passed is True for check in done.checks)
    yield f"verified: {passed} checks passed; `quantlab verify {done.path}` shows them"
    for check in done.checks:
        if check.passed is None:
            yield f"  {check.name}: {check.detail}"
