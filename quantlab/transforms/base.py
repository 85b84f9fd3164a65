"""The registry of transforms. What a transform does, and when, is its own: the engine knows each kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, TypeVar

from quantlab.errors import RecipeError


class Transform(Protocol):
    """A way to rewrite a model. An implementation is a frozen dataclass whose fields are its options."""

    name: ClassVar[str]


_REGISTRY: dict[str, type[Transform]] = {}
_T = TypeVar("_T", bound=type)


def register(name: str) -> Callable[[_T], _T]:
    """Enter a transform under the name that recipes use."""

    def enter(cls: _T) -> _T:
        cls.name = name  # type: ignore[attr-defined]
        _REGISTRY[name] = cls
        return cls

    return enter


def transform_names() -> list[str]:
    """The registered methods."""
    return sorted(_REGISTRY)


def make_transform(name: str, options: Mapping[str, Any]) -> Transform:
    """The method called ``name`` with these options.

    Raises:
        RecipeError: no such method, an option that it does not have, or a value that it refuses.
    """
    if name not in _REGISTRY:
        raise RecipeError(f"transform {name!r} is unknown; use one of {', '.join(transform_names())}")
    cls: Any = _REGISTRY[name]
    known = [f.name for f in dataclasses.fields(cls)]
    for option in options:
        if option not in known:
            has = f"its options are {', '.join(known)}" if known else "it has no options"
            raise RecipeError(f"transform {name!r} has no option {option!r}; {has}")
    return cls(**options)
