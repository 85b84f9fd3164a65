"""Methods by name: each axis of a recipe has a registry of the methods that it can name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from quantlab.errors import RecipeError

_Method = TypeVar("_Method")
_Class = TypeVar("_Class", bound=type)


class Registry(Generic[_Method]):
    """The methods of one axis. A method is a frozen dataclass whose fields are its options.

    Args:
        axis: what recipes call the axis, for messages.
    """

    def __init__(self, axis: str) -> None:
        self.axis = axis
        self._classes: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[_Class], _Class]:
        """Enter a method under the name that recipes use; it becomes the class's ``name``."""

        def enter(cls: _Class) -> _Class:
            cls.name = name  # type: ignore[attr-defined]
            self._classes[name] = cls
            return cls

        return enter

    def names(self) -> list[str]:
        """The registered methods."""
        return sorted(self._classes)

    def options(self, name: str) -> list[str]:
        """The options of the method called ``name``, in the order of definition.

        Raises:
            RecipeError: no such method.
        """
        if name not in self._classes:
            raise RecipeError(f"{self.axis} {name!r} is unknown; use one of {', '.join(self.names())}")
        return [field.name for field in dataclasses.fields(self._classes[name])]

    def make(self, name: str, options: Mapping[str, Any]) -> _Method:
        """The method called ``name`` with these options.

        Raises:
            RecipeError: no such method, an option that it does not have, or a value that it refuses.
        """
        known = self.options(name)
        for option in options:
            if option not in known:
                has = f"its options are {', '.join(known)}" if known else "it has no options"
                raise RecipeError(f"{self.axis} {name!r} has no option {option!r}; {has}")
        made: _Method = self._classes[name](**options)
        return made


def is_number(value: object) -> bool:
    """Whether an option's value is a number: true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
