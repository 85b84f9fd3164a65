"""A recipe: a default scheme, exceptions by pattern, and everything else that a run is told."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

from quantlab.errors import RecipeError
from quantlab.recipe.allowed import check_keys
from quantlab.recipe.scheme import OPTIONS, Scheme, changed


@dataclass(frozen=True)
class Calibration:
    """Which text the layers see: ``samples`` sequences of ``length`` tokens, drawn from ``source``."""

    source: str = "builtin"
    samples: int = 64
    length: int = 512
    seed: int = 0
    bos: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("length", 2), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise RecipeError(f"calibration.{name} {value!r}: use a whole number, at least {least}")
        if not isinstance(self.source, str):
            raise RecipeError(f"calibration.source {self.source!r}: use a name or a path, such as builtin")
        if type(self.bos) is not bool and self.bos != "auto":
            raise RecipeError(f"calibration.bos {self.bos!r}: use auto, true or false")


@dataclass(frozen=True)
class Recipe:
    """A default scheme, exceptions by pattern (the last that matches wins), and the calibration data.

    Patterns are globs over module names (``*.mlp.down_proj``), or regular expressions after ``re:``.

    Attributes:
        name: what the recipe is called.
        description: when to use it.
        default: the scheme of the layers that no pattern names.
        transforms: how the model is rewritten before it is quantized: methods in order, each with its options.
        layers: changes to the default scheme, by pattern.
        calibration: which text the layers see.
        plan: what the allocator says of how it chose the layers' schemes; carried along, never acted on.
    """

    name: str = "custom"
    description: str = ""
    default: Scheme = field(default_factory=Scheme)
    transforms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)
    plan: Mapping[str, Any] = field(default_factory=dict)

    def scheme(self, layer: str) -> Scheme:
        """The scheme of the layer called ``layer``."""
        scheme = self.default
        for pattern in self.patterns_for(layer):
            scheme = changed(scheme, self.layers[pattern], f"layers[{pattern!r}]")
        return scheme

    def patterns_for(self, layer: str) -> list[str]:
        """The patterns that match the layer called ``layer``, in their order."""
        matching = [pattern for pattern in self._wide if matches(pattern, layer)]
        if layer in self._places and layer not in self._wide:
            matching.append(layer)
        return sorted(matching, key=self._places.__getitem__)

    @cached_property
    def _wide(self) -> tuple[str, ...]:
        """The patterns that are more than a layer's name: few, where a plan has a name for each of thousands."""
        return tuple(p for p in self.layers if p.startswith("re:") or any(sign in p for sign in "*?["))

    @cached_property
    def _places(self) -> dict[str, int]:
        """The order of all patterns."""
        return {pattern: place for place, pattern in enumerate(self.layers)}

    def to_dict(self) -> dict[str, Any]:
        """A plain mapping that :func:`from_dict` reads back."""
        flat = {f.name: getattr(self.default, f.name) for f in fields(Scheme)}
        return {
            "name": self.name,
            "description": self.description,
            **(flat | {key: dict(flat[key]) for key in OPTIONS.values()}),
            "transforms": {method: dict(options) for method, options in self.transforms.items()},
            "layers": {pattern: dict(changes) for pattern, changes in self.layers.items()},
            "calibration": {f.name: getattr(self.calibration, f.name) for f in fields(Calibration)},
            **({"plan": dict(self.plan)} if self.plan else {}),
        }


def matches(pattern: str, name: str) -> bool:
    """Whether a glob, or a regular expression after ``re:``, matches the whole of ``name``."""
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except (re.error, OverflowError, RecursionError) as error:
            raise RecipeError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    return fnmatch.fnmatchcase(name, pattern)


def from_dict(data: Mapping[str, Any]) -> Recipe:
    """A recipe from a plain mapping; every key and value is checked.

    Raises:
        RecipeError: names the key, the value and what is allowed.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"a recipe is a mapping of keys to values, not {type(data).__name__}")
    scheme_keys = {f.name for f in fields(Scheme)}
    own = {"name", "description", "transforms", "layers", "calibration", "plan"}
    check_keys(data, scheme_keys | own, "the recipe")
    name, description = data.get("name", "custom"), data.get("description", "")
    for key, value in (("name", name), ("description", description)):
        if not isinstance(value, str):
            raise RecipeError(f"{key} {value!r}: use text, in quotes if need be")
    layers, calibration, plan = (
        {} if data.get(key) is None else data[key] for key in ("layers", "calibration", "plan")
    )
    for key, value in (("layers", layers), ("calibration", calibration), ("plan", plan)):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{key}: expected a mapping, not {value!r}")
    check_keys(calibration, {f.name for f in fields(Calibration)}, "calibration")
    default = changed(Scheme(), {k: v for k, v in data.items() if k in scheme_keys}, "the recipe")
    for pattern, changes in layers.items():
        if not isinstance(pattern, str):
            raise RecipeError(f"layers[{pattern!r}]: a pattern is text; put it in quotes")
        if not isinstance(changes, Mapping):
            raise RecipeError(f"layers[{pattern!r}]: expected a mapping such as {{format: int8}}, not {changes!r}")
        matches(pattern, "")
        changed(default, changes, f"layers[{pattern!r}]")
    return Recipe(
        name=name,
        description=description.strip(),
        default=default,
        transforms=_transforms(data.get("transforms")),
        layers=dict(layers),
        calibration=Calibration(**calibration),
        plan=dict(plan),
    )


def _transforms(value: Any) -> dict[str, dict[str, Any]]:
    """A method's name, a list of names, or a mapping of names to options, as a mapping in order."""
    if value is None or value == "none":
        return {}
    named = [value] if isinstance(value, str) else value
    if isinstance(named, list) and all(isinstance(name, str) for name in named):
        return {name: {} for name in named}
    if not isinstance(named, Mapping) or not all(
        isinstance(name, str) and (options is None or isinstance(options, Mapping)) for name, options in named.items()
    ):
        raise RecipeError(f"transforms {value!r}: use a method's name, a list of names, or names with their options")
    return {name: dict(options or {}) for name, options in named.items()}
