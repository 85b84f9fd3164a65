"""Keys and words that recipes may have: what is not among them is refused, with the nearest that is."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from quantlab.errors import RecipeError


def check_keys(data: Mapping[Any, Any], keys: Collection[str], where: str) -> None:
    """Refuse a mapping, which stands ``where``, with a key that is not one of ``keys``.

    Raises:
        RecipeError: names the key and the nearest of ``keys``.
    """
    for key in data:
        if key not in keys:
            hint = did_you_mean(str(key), keys) or f"; allowed are {', '.join(sorted(keys))}"
            raise RecipeError(f"{where}: unknown key {key!r}{hint}")


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """Refuse a value of the key ``name`` that is not one of the words ``allowed``.

    Raises:
        RecipeError: lists the words.
    """
    if not isinstance(value, str) or value not in allowed:
        raise RecipeError(f"{name} {value!r}: use one of {', '.join(allowed)}")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`` (did you mean a or b?)``, of the names that are nearest; empty if none is near."""
    close = difflib.get_close_matches(name, list(names), n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
