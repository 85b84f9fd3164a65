"""Where things are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Where quantlab keeps what it can make again: `$QUANTLAB_CACHE`, or the user's cache folder."""
    if chosen := os.environ.get("QUANTLAB_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "quantlab"
