"""Text that needs no network: CPython's language reference and standard library, and some prose of our own.

The first two are on every machine with Python. They come in two parts, one to calibrate with and one to
measure with, about two thirds and one third of the characters. The part is decided by the name of a topic
or a module, so it is the same in every version of Python, and a document that repeats a passage of a longer
one is left out of both: nothing that was calibrated with is measured with.

The language reference alone is a narrow text, and methods that fit a layer to its inputs fit it to just that.
So calibration has prose beside it, which this package brings: passages of 71 State of the Union addresses of
1880 to 2020 and of 69 chapters of Moby-Dick (1851), all in the public domain.
"""

from __future__ import annotations

import gzip
import hashlib
import sysconfig
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

from .errors import EvalError

Part = Literal["calibration", "eval"]

PASSAGE = 200
"""No two documents share this many characters in a row (white space counts as one space)."""

_NO_PROSE = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "__phello__"}
_TABLES = {"encodings", "pydoc_data", "lib-dynload"}
_NOT_CPYTHON = {"site-packages", "dist-packages", "__pycache__"}


def general_documents(part: Part) -> list[str]:
    """Return the language reference (`pydoc_data.topics`), one document a topic, in a fixed mixed order.

    To calibrate with there is prose among it. Raises `EvalError` where Python was installed without it.
    """
    return list(_general()[part])


def code_documents(part: Part) -> list[str]:
    """Return the standard library's source, one document a file, in a fixed mixed order.

    Left out: tests, bundled programs, files that are tables. Raises `EvalError` where Python was installed
    without its source.
    """
    return list(_code()[part])


@cache
def _general() -> dict[Part, tuple[str, ...]]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise EvalError(
            "builtin: this Python was installed without pydoc_data, the language reference that the source "
            "'builtin' is made of; give the path of a text file instead"
        ) from error
    return _split(topics, beside=_prose())


def _prose() -> dict[str, str]:
    packed = resources.files(__package__).joinpath("prose.txt.gz").read_bytes()
    documents = gzip.decompress(packed).decode("utf-8").split("\f")
    return {f"prose/{number}": document for number, document in enumerate(documents)}


@cache
def _code() -> dict[Part, tuple[str, ...]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        made_at_build = parts[0].startswith(("config-", "_sysconfigdata"))
        if made_at_build or not (_NO_PROSE | _TABLES | _NOT_CPYTHON).isdisjoint(parts):
            continue
        try:
            files["/".join(parts)] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
    if not files:
        raise EvalError(
            f"python-code: no Python source in {root}; this Python was installed without it, "
            "so give the path of a text file instead"
        )
    return _split(files)


def _split(documents: Mapping[str, str], beside: Mapping[str, str] | None = None) -> dict[Part, tuple[str, ...]]:
    """Both parts of named documents, in the order of a hash of their names; ``beside`` is only calibrated with."""
    parts: dict[Part, dict[str, str]] = {"calibration": dict(beside or {}), "eval": {}}
    for name in _without_repeats(documents):
        parts[_part(name)][name] = documents[name]
    return {
        part: tuple(found[name] for name in sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest()))
        for part, found in parts.items()
    }


def _part(name: str) -> Part:
    """Every third topic, or module with all its submodules, by a hash of its name.

    The prefix was chosen for parts that weigh 2 : 1 in CPython 3.10 to 3.13.
    """
    module = name.split("/")[0].removesuffix(".py")
    return "eval" if hashlib.sha256(f"eval:{module}".encode()).digest()[0] % 3 == 0 else "calibration"


def _without_repeats(documents: Mapping[str, str]) -> list[str]:
    """Names of the documents that share no passage with a longer one.

    A shared passage of `PASSAGE` characters holds a whole one of the half-length pieces that the longer
    document is cut into, so it is enough to look for those pieces at every position of the shorter one.
    """
    piece = PASSAGE // 2
    seen: set[str] = set()
    kept = []
    for name in sorted(documents, key=lambda name: (-len(documents[name]), name)):
        text = " ".join(documents[name].split())
        starts = range(len(text) - piece + 1)
        if any(text[start : start + piece] in seen for start in starts):
            continue
        seen.update(text[start : start + piece] for start in starts[::piece])
        kept.append(name)
    return kept
