"""Records as JSON lines: appended one by one, read back after whatever happened."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantlab.errors import DataError


class Records:
    """A file of records, each under a key; the last one under a key counts.

    A line that a killed process left half-written is skipped.

    Raises:
        DataError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8") if path.exists() else ""
        except OSError as error:
            raise DataError(f"{path}: cannot be used ({error.strerror}); choose another folder") from error
        self._ends_with_a_line = not text or text.endswith("\n")
        for line in text.split("\n"):
            try:
                record = json.loads(line)
                self._records[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                continue

    def get(self, key: str) -> dict[str, Any] | None:
        """The record under a key, unless it is one of a failure."""
        record = self._records.get(key)
        return None if record is None or "error" in record else record

    def last(self, key: str) -> dict[str, Any] | None:
        """The record under a key, a failure's included."""
        return self._records.get(key)

    def append(self, key: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Add a record, on disk when this returns; numbers that are not finite become null."""
        entry = {"key": key, **_finite(dict(record))}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("" if self._ends_with_a_line else "\n") + json.dumps(entry, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror})") from error
        self._ends_with_a_line = True
        self._records[key] = entry
        return entry


def _finite(value: Any) -> Any:
    """Numbers that are not finite as None: JSON has no others."""
    if isinstance(value, Mapping):
        return {str(name): _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
