"""A ``.gguf`` file as its reader gives it: opened or refused, and what its header says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf

from quantlab.errors import CheckpointError

ROPE_FREQS = "rope_freqs.weight"
"""The tensor that is no weight: what rope's frequencies are divided by."""
INSTEAD = "use the model's Hugging Face folder instead"
"""The remedy for a file that cannot be read, or not whole."""


def existing_file(path: Path) -> Path:
    """The file's absolute path.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path).expanduser().resolve()
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the path of a .gguf file.")
    return path


def open_file(path: Path) -> gguf.GGUFReader:
    """A reader of a whole model in one file; tensors are read when they are asked for.

    Raises:
        CheckpointError: it is cut short, not GGUF, or one of several parts.
    """
    size = path.stat().st_size
    with or_refuse(f"{path}: {size} bytes, not a complete GGUF file", "download it again"):
        reader = gguf.GGUFReader(path)
        if field(reader, "general.architecture") is None:
            raise ValueError("no general.architecture in it")
    if (parts := field(reader, "split.count", 1)) > 1:
        raise CheckpointError(f"{path}: one of {parts} parts; first merge them: `llama-gguf-split --merge`.")
    return reader


def field(reader: gguf.GGUFReader, name: str, default: Any = None) -> Any:
    """What the file's header says under ``name``."""
    found = reader.get_field(name)
    return default if found is None else found.contents()


@contextmanager
def or_refuse(what: str, remedy: str = INSTEAD) -> Iterator[None]:
    """Turn whatever a reader throws at a file that it does not expect into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what} ({type(error).__name__}: {error}); {remedy}.") from error
