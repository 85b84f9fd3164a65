"""Where text comes from: the built-in parts, a file, a Hugging Face data set, or a list of strings.

A document is returned as it stands: nothing is stripped, cut or filtered, empty rows included. Only the line
ends of a text file are read as Python reads them, CR LF as LF: they differ between copies of one text, and
each would have its own perplexity.
"""

from __future__ import annotations

import difflib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .builtin_text import code_documents, general_documents
from .errors import EvalError

BUILTIN = ("builtin", "builtin:eval", "python-code", "python-code:eval")

_ROW_SUFFIXES = (".jsonl", ".json", ".ndjson")
_TEXT_SUFFIXES = (
    *_ROW_SUFFIXES,
    ".txt",
    ".text",
    ".md",
    ".rst",
    ".tex",
    ".html",
    ".xml",
    ".csv",
    ".tsv",
    ".py",
)
_KINDS = (
    f"{', '.join(BUILTIN)}, the path of a text file, 'rows.jsonl' or 'rows.jsonl:field', "
    "or a Hugging Face data set as 'name:config:split:column' (the config may be empty)"
)


@dataclass(frozen=True)
class TextSource:
    """Documents, and where they came from.

    `name` is what was asked for, `origin` says in words what was found.
    """

    name: str
    origin: str
    documents: tuple[str, ...]


def load_documents(source: str | Sequence[str], *, limit: int | None = None) -> list[str]:
    """Return the documents of a source, the first `limit` of them; see `load_text` for the sources."""
    return list(load_text(source, limit=limit).documents)


def load_text(source: str | Sequence[str], *, limit: int | None = None) -> TextSource:
    """Read a source of text, with a note of where it came from.

    * `builtin`, `builtin:eval`: CPython's language reference, one document a topic, to calibrate with mixed with
      prose of the public domain;
    * `python-code`, `python-code:eval`: the standard library, one document a file;
    * a path: the file is one document; a `.jsonl`, `.ndjson` or `.json` file holds one object a line, with
      the document in the field `text`, or in another one: `path.jsonl:field`;
    * `name:config:split:column`: a Hugging Face data set, or a local folder that `datasets` can read,
      streamed; without a `limit` the whole split is read;
    * a list of strings is passed through.

    `limit` is a number of documents: topics, files, lines or rows. Raises `EvalError` if the source is not
    found, is not text, or has no text in it.
    """
    if limit is not None and limit < 1:
        raise EvalError(f"limit is {limit}, a number of documents; use 1 or more, or None for all")
    if not isinstance(source, str):
        found = TextSource("list", "strings given in Python", tuple(islice(source, limit)))
        for index, document in enumerate(found.documents):
            if not isinstance(document, str):
                raise EvalError(f"document {index} of the list is a {type(document).__name__}; give strings")
    else:
        found = _load_named(source, limit)
    if not any(document.strip() for document in found.documents):
        raise EvalError(
            f"{found.name}: no text in it ({len(found.documents)} documents, all empty); "
            f"give a source with text, one of: {_KINDS}"
        )
    return found


def _load_named(source: str, limit: int | None) -> TextSource:
    if source in BUILTIN:
        return _load_builtin(source, limit)
    if "\n" in source or len(source) > 4096:
        raise EvalError(
            f"{source[:40]!r}... ({len(source)} characters) is not the name of a source of text; "
            "if it is the text itself, give a list of strings"
        )
    path = Path(source).expanduser()
    if source and path.is_dir():
        raise EvalError(
            f"{source} is a folder; name one file in it, or '{source}::train:text' for a folder "
            "that the datasets library can read"
        )
    if path.is_file():
        return _load_file(path, "text", limit)
    stem, colon, field = source.rpartition(":")
    if colon and stem.endswith(_ROW_SUFFIXES):
        path = Path(stem).expanduser()
        if path.is_file():
            return _load_file(path, field, limit)
        raise _not_found(path)
    if source.count(":") == 3:
        return _load_dataset(source, limit)
    if "/" in source or path.suffix in _TEXT_SUFFIXES:
        raise _not_found(path)
    raise EvalError(f"{source!r} is not a source of text that can be read; give one of: {_KINDS}")


def _load_builtin(source: str, limit: int | None) -> TextSource:
    name, _, wanted = source.partition(":")
    load = general_documents if name == "builtin" else code_documents
    what = "language reference" if name == "builtin" else "standard library"
    documents = load("eval" if wanted else "calibration")[:limit]
    origin = f"CPython {platform.python_version()}, {what}, {wanted or 'calibration'} part"
    origin += ", and prose" if source == "builtin" else ""
    return TextSource(source, origin, tuple(documents))


def _load_file(path: Path, field: str, limit: int | None) -> TextSource:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EvalError(
            f"{path}: byte {error.start} is not UTF-8 ({error.reason}); give a text file, "
            "or convert it with: iconv -f <its encoding> -t utf-8"
        ) from error
    except OSError as error:
        raise EvalError(f"{path}: cannot be read ({error.strerror}); give a file that can") from error
    if path.suffix not in _ROW_SUFFIXES:
        return TextSource(str(path), "a text file, one document", (text,))
    documents = islice(_rows(path, text.removeprefix("\ufeff"), field), limit)
    return TextSource(f"{path}:{field}", "a file of JSON lines, one document a line", tuple(documents))


def _rows(path: Path, text: str, field: str) -> Any:
    # Not str.splitlines: JSON strings may hold U+2028 and its kind unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise EvalError(
                f"{path}, line {number}: not JSON ({error.msg}, column {error.colno}); "
                "the file must hold one JSON object a line"
            ) from error
        if not isinstance(row, dict):
            raise EvalError(
                f"{path}, line {number}: a {type(row).__name__}, not an object; "
                'the file must hold one JSON object a line, like {"text": "..."}'
            )
        if field not in row:
            raise EvalError(
                f"{path}, line {number}: no field {field!r}; the fields are {', '.join(row) or '(none)'}; "
                f"choose one with {path}:FIELD"
            )
        if not isinstance(row[field], str):
            raise EvalError(
                f"{path}, line {number}: field {field!r} is a {type(row[field]).__name__}, not a string; "
                f"choose another of {', '.join(row)} with {path}:FIELD"
            )
        yield row[field]


def _load_dataset(source: str, limit: int | None) -> TextSource:
    name, config, split, column = source.split(":")
    if not (name and split and column):
        raise EvalError(f"{source!r}: a data set is 'name:config:split:column'; only the config may be empty")
    # Imported here: it takes seconds, and the other sources do not need it.
    from datasets import load_dataset

    documents: list[str] = []
    try:
        for row in islice(load_dataset(name, config or None, split=split, streaming=True), limit):
            if column not in row:
                raise EvalError(
                    f"{source}: no column {column!r}; the columns are {', '.join(row)}; "
                    f"use '{name}:{config}:{split}:COLUMN'"
                )
            if not isinstance(row[column], str):
                raise EvalError(
                    f"{source}: row {len(documents)} of column {column!r} is a "
                    f"{type(row[column]).__name__}, not a string; choose another of {', '.join(row)}"
                )
            documents.append(row[column])
    except EvalError:
        raise
    # The hub's clients raise a dozen unrelated types for what is one thing to the user.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise EvalError(
            f"{source}: the data set {name!r} cannot be read ({type(error).__name__}: {reason}). "
            "Check its name, config and split; if the Hugging Face hub cannot be reached from here, "
            "save the text to a local .txt or .jsonl file and give its path"
        ) from error
    return TextSource(source, "a Hugging Face data set, one document a row", tuple(documents))


def _not_found(path: Path) -> EvalError:
    folder = path.parent
    if not folder.is_dir():
        return EvalError(f"{path}: not found, and there is no folder {folder}; give the path of a text file")
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(str(folder / name) for name in near)}?" if near else "give an existing file"
    return EvalError(f"{path}: not found; {hint}")
