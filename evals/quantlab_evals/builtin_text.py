"""Text that every machine with Python already has: CPython's language reference, and its standard library.

Both come in two parts, one to calibrate with and one to measure with, about two thirds and one third of
the characters. The part is decided by the name of a topic or a module, so it is the same in every version
of Python, and a document that repeats a passage of a longer one is left out of both: nothing that was
calibrated with is measured with.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

from .errors import EvalError

Part = Literal["calibration", "eval"]

PASSAGE = 200
"""No two documents share this many characters in a row (white space counts as one space)."""

_NO_PROSE = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "__phello__"}
_TABLES = {"encodings", "pydoc_data", "lib-dynload"}
_NOT_CPYTHON = {"site-packages", "dist-packages", "__pycache__"}


def reference_documents(part: Part) -> list[str]:
    """Return the language reference (`pydoc_data.topics`), one document a topic, in a fixed mixed order.

    Raises `EvalError` where Python was installed without it.
    """
    return list(_reference()[part])


def code_documents(part: Part) -> list[str]:
    """Return the standard library's source, one document a file, in a fixed mixed order.

    Left out: tests, bundled programs, files that are tables. Raises `EvalError` where Python was installed
    without its source.
    """
    return list(_code()[part])


@cache
def _reference() -> dict[Part, tuple[str, ...]]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise EvalError(
            "builtin: this Python was installed without pydoc_data, the language reference that the source "
            "'builtin' is made of; give the path of a text file instead"
        ) from error
    return _split(topics)


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


def _split(documents: Mapping[str, str]) -> dict[Part, tuple[str, ...]]:
    names = _without_repeats(documents)
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    parts: dict[Part, tuple[str, ...]] = {}
    for part in ("calibration", "eval"):
        parts[part] = tuple(documents[name] for name in names if _part(name) == part)
    return parts


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
