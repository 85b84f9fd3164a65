"""Recipes by name, from YAML, and with changes from a command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from quantlab.errors import RecipeError
from quantlab.recipe.allowed import did_you_mean
from quantlab.recipe.recipe import Recipe, from_dict
from quantlab.recipe.scheme import OPTIONS


class _Loader(yaml.SafeLoader):
    """YAML as people write it: ``1e-3`` is a number, as in YAML 1.2; PyYAML alone wants ``1.0e-3``."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe by its ready name, from a YAML file, a mapping or as it is, with ``key=value`` overrides.

    An override's key may be dotted (``calibration.samples=128``, ``options.damping=0.05``); its value YAML.
    One that changes a method drops the recipe's options for it, which mean nothing to another method.

    Raises:
        RecipeError: no such recipe, unreadable YAML, or a key or value that is not allowed.
    """
    if isinstance(source, Recipe):
        recipe = from_dict(source.to_dict())
    else:
        recipe = from_dict(source if isinstance(source, Mapping) else parse_yaml(*_read(str(source))))
    settings = [_setting(override) for override in overrides]
    data = recipe.to_dict()
    for method, options in OPTIONS.items():
        if any(path == [method] and value != getattr(recipe.default, method) for path, value in settings):
            del data[options]
    for path, value in settings:
        data = _assigned(data, path, value)
    return from_dict(data)


def ready_recipes() -> dict[str, Recipe]:
    """The recipes that ship with quantlab, by name."""
    files = sorted(resources.files("quantlab_recipes").iterdir(), key=lambda file: file.name)
    return {
        file.name.removesuffix(".yaml"): from_dict(parse_yaml(file.name, file.read_text(encoding="utf-8")))
        for file in files
        if file.name.endswith(".yaml")
    }


def _read(source: str) -> tuple[str, str]:
    try:
        if (path := Path(source)).is_file():
            return source, path.read_text(encoding="utf-8")
        ready = resources.files("quantlab_recipes") / f"{source}.yaml"
        if "/" not in source and ready.is_file():
            return source, ready.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RecipeError(f"recipe {source!r} cannot be read: {error}") from error
    raise RecipeError(
        f"recipe {source!r} is neither a file nor a ready recipe{did_you_mean(source, ready_recipes())}; "
        f"ready are: {', '.join(ready_recipes())}"
    )


def parse_yaml(where: str, text: str) -> Any:
    """A YAML document or value; ``where`` it stands, for the message of a RecipeError."""
    try:
        return yaml.load(text, Loader=_Loader)
    # PyYAML lets what Python says of an impossible date or number through.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise RecipeError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def _setting(override: str) -> tuple[list[str], Any]:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override!r}: expected key=value, for example --set format=int3")
    return key.strip().split("."), parse_yaml(f"--set {override}", value)


def _assigned(data: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    key, *rest = path
    if rest:
        inner = {} if data.get(key) is None else data[key]
        if not isinstance(inner, Mapping):
            raise RecipeError(f"{'.'.join(path)}: {key} is {inner!r}, which has no parts; use {key}=value")
        value = _assigned(inner, rest, value)
    return {**data, key: value}
