"""Recipes: what to do with each layer. YAML on disk, frozen dataclasses in memory.

A recipe names one choice on each axis (format, quantizer, ...) for all layers, and lists exceptions by
pattern. A mixed-precision plan is a recipe with one line a layer; nothing here treats it specially.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from quantlab.errors import RecipeError
from quantlab.numerics import (
    ACTIVATIONS,
    Format,
    Granularity,
    Grid,
    Sample,
    Scales,
    choose_scales,
    format_called,
    scale_type,
)

_SEARCHES = ("absmax", "mse", "second-moment")
# Where the options of a method stand that a key names.
_OPTIONS = {"quantizer": "options", "compensation": "compensation_options"}


class _Loader(yaml.SafeLoader):
    """YAML as people write it: ``1e-3`` is a number, as in YAML 1.2; PyYAML alone wants ``1.0e-3``."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass(frozen=True)
class Scheme:
    """What a recipe says of one layer, fully resolved.

    Attributes:
        format: a grid's name, or ``"none"``: the layer stays as it is.
        granularity: a group size along the inputs, ``"channel"`` or ``"tensor"``: what shares a scale.
        symmetric: no zero; the scale is signed and full-range.
        scale_search: ``absmax``, ``mse`` (searched, all inputs alike) or ``second-moment`` (searched, inputs
            weighted by their second moment).
        scale_dtype: how scales are stored: float32, float16, bfloat16, e8m0 (powers of two), or 8-bit codes under a
            second level: e4m3, int8, dynamic8.
        quantizer: the rounding method's name.
        options: the rounding method's own options.
        compensation: the name of what repairs the error that rounding leaves, or ``"none"``.
        compensation_options: its own options.
        activations: what the layer's inputs are rounded to when it runs, a scale a token, as they come: int8, fp8
            (e4m3), or ``"none"``. Which weights allow it: :func:`quantlab.numerics.activations.reason_against`.
    """

    format: str = "int4"
    granularity: Granularity = 64
    symmetric: bool = True
    scale_search: str = "second-moment"
    scale_dtype: str = "bfloat16"
    quantizer: str = "rtn"
    options: Mapping[str, Any] = field(default_factory=dict)
    compensation: str = "none"
    compensation_options: Mapping[str, Any] = field(default_factory=dict)
    activations: str = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.format, str):
            raise RecipeError(f"format {self.format!r}: use a name such as int4, or none")
        self.known_format  # noqa: B018 - an unknown format is refused here
        bad_group = self.granularity not in ("channel", "tensor") and not (
            type(self.granularity) is int and self.granularity > 0
        )
        if bad_group:
            raise RecipeError(f"granularity {self.granularity!r}: use a group size such as 64, 'channel' or 'tensor'")
        _one_of("scale_search", self.scale_search, _SEARCHES)
        scale_type(self.scale_dtype)
        _one_of("activations", self.activations, ACTIVATIONS)
        if type(self.symmetric) is not bool:
            raise RecipeError(f"symmetric {self.symmetric!r}: use true or false")
        if not isinstance(self.quantizer, str):
            raise RecipeError(f"quantizer {self.quantizer!r}: use a method's name, such as rtn or gptq")
        if not isinstance(self.compensation, str):
            raise RecipeError(f"compensation {self.compensation!r}: use a method's name, such as qera-exact, or none")
        for key, whose in (("options", "quantizer"), ("compensation_options", "compensation")):
            if not isinstance(getattr(self, key), Mapping):
                raise RecipeError(f"{key} {getattr(self, key)!r}: use a mapping of the {whose}'s options")

    @property
    def keeps(self) -> bool:
        """Whether the layer stays in its original precision."""
        return self.format == "none"

    @property
    def known_format(self) -> Format | None:
        """The format; None where the layer stays as it is."""
        return None if self.format == "none" else format_called(self.format)

    @property
    def bits(self) -> int:
        """Width of a code."""
        assert self.known_format is not None, "a layer that stays as it is has no codes"
        return self.known_format.bits

    def grid_for(self, weight: torch.Tensor, importance: torch.Tensor | None) -> Grid:
        """What the codes of this weight mean; its arguments are those of :meth:`choose_scales`."""
        form = self.known_format
        assert form is not None, "a layer that stays as it is has no codes"
        return form.grid_for(Sample(weight if form.fit is None else weight.float(), self.granularity, importance))

    def choose_scales(
        self,
        weight: torch.Tensor,
        grid: Grid,
        importance: torch.Tensor | None,
        granularity: Granularity | None = None,
    ) -> Scales:
        """Scales, and zeros where asymmetric, as the scheme wants them; see :func:`quantlab.numerics.choose_scales`.

        Args:
            weight: ``[out, in]``, floating-point.
            grid: what its codes mean.
            importance: ``[in]``, or None.
            granularity: instead of the scheme's own, for a part of a weight.
        """
        return choose_scales(
            weight,
            grid,
            granularity or self.granularity,
            symmetric=self.symmetric,
            search=self.scale_search != "absmax",
            importance=importance,
            stored=self.scale_dtype,
        )


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
        for pattern, changes in self.layers.items():
            if matches(pattern, layer):
                scheme = changed(scheme, changes, f"layers[{pattern!r}]")
        return scheme

    def to_dict(self) -> dict[str, Any]:
        """A plain mapping that :func:`from_dict` reads back."""
        flat = {f.name: getattr(self.default, f.name) for f in fields(Scheme)}
        return {
            "name": self.name,
            "description": self.description,
            **(flat | {key: dict(flat[key]) for key in _OPTIONS.values()}),
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
    _known(data, scheme_keys | own, "the recipe")
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
    _known(calibration, {f.name for f in fields(Calibration)}, "calibration")
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
    for method, options in _OPTIONS.items():
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
        f"recipe {source!r} is neither a file nor a ready recipe{_nearest(source, ready_recipes())}; "
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


def changed(scheme: Scheme, changes: Mapping[str, Any], where: str) -> Scheme:
    """``scheme`` with some fields changed; a method's options are added to those that it has, or begin anew with it.

    Raises:
        RecipeError: says ``where``, the key, the value and what is allowed.
    """
    _known(changes, {f.name for f in fields(Scheme)}, where)
    values = dict(changes)
    for method, key in _OPTIONS.items():
        options = {} if values.get(key) is None else values[key]
        if isinstance(options, Mapping) and values.get(method, getattr(scheme, method)) == getattr(scheme, method):
            options = {**getattr(scheme, key), **options}  # another method's options would mean nothing to this one
        values[key] = options
    try:
        return replace(scheme, **values)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _known(data: Mapping[str, Any], keys: set[str], where: str) -> None:
    for key in data:
        if key not in keys:
            hint = _nearest(str(key), keys) or f"; allowed are {', '.join(sorted(keys))}"
            raise RecipeError(f"{where}: unknown key {key!r}{hint}")


def _one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise RecipeError(f"{name} {value!r}: use one of {', '.join(allowed)}")


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
