"""Spaces of variants: what a sweep tries.

A space is a YAML file (or a mapping)::

    recipe: w4-rtn              # what holds where nothing else is said: a ready recipe, or a file
    calibration: {samples: 32}  # changes to every recipe's calibration
    grids:                      # every combination of each
      - {formats: [int], bits: [2, 3, 4], quantizers: [rtn, gptq], compensation: [none, "qera-exact:16"]}
      - {recipes: [awq-w4, w3-gptq], calibration: [builtin, python-code]}
    variants:                   # one by one
      - w4-gptq
      - {recipe: w4-gptq, name: my own, set: [options.damping=0.05]}
    baselines: ["bitsandbytes:nf4", "torchao:int8", model.Q4_K_M.gguf]

The axes of a grid are those of :mod:`quantlab.variants`, and those of whole recipes: ``recipes``, ``transforms``,
``calibration`` (its source), ``samples``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

from quantlab.checkpoint.baseline import TOOLS, split_baseline
from quantlab.errors import RecipeError
from quantlab.recipe import Recipe, load_recipe, parse_yaml
from quantlab.variants import AXES, expand, method_name

SpaceSource = str | Path | Mapping[str, Any]
READY = "spaces"
ORIGINAL = "original"

_KEYS = ("name", "description", "recipe", "calibration", "grids", "variants", "baselines")
# Axes of a grid that change a recipe as a whole, as overrides of it; `recipes` says which one.
_RECIPE_AXES = {"transforms": "transforms", "calibration": "calibration.source", "samples": "calibration.samples"}


@dataclass(frozen=True)
class Candidate:
    """One row of a sweep, before it is measured.

    Attributes:
        name: tells it from the others.
        recipe: by which the model is quantized; None where another tool did that, or nobody.
        baseline: ``bitsandbytes:nf4``, ``torchao:int8`` or a ``.gguf`` file; None for others.
    """

    name: str
    recipe: Recipe | None = None
    baseline: str | None = None

    @property
    def kind(self) -> str:
        """``quantized``, ``baseline`` or ``original``."""
        return "quantized" if self.recipe else "baseline" if self.baseline else ORIGINAL

    def identity(self) -> Any:
        """What its figures depend on, beside the model and the measurement; JSON-able."""
        if self.recipe is None:
            return self.baseline or ORIGINAL
        return {key: value for key, value in self.recipe.to_dict().items() if key not in ("name", "description")}

    def labels(self) -> dict[str, Any]:
        """What it can be filtered by."""
        if self.recipe is None:
            tool, _, kind = (self.baseline or ORIGINAL).partition(":")
            tool, kind = (tool, kind) if kind else ("gguf", tool) if self.baseline else (ORIGINAL, ORIGINAL)
            return {"format": kind, "quantizer": tool, "compensation": "none", "transforms": "none"}
        scheme = self.recipe.default
        return {
            "format": scheme.format,
            "group": str(scheme.granularity),
            "quantizer": scheme.quantizer,
            "compensation": scheme.compensation,
            "transforms": ", ".join(self.recipe.transforms) or "none",
            "calibration": self.recipe.calibration.source,
        }


@dataclass(frozen=True)
class Space:
    """What a sweep tries: rows in order, the original first."""

    name: str
    candidates: tuple[Candidate, ...]


def load_space(source: SpaceSource, overrides: Iterable[str] = ()) -> Space:
    """A space by its ready name, from a YAML file or a mapping.

    Args:
        source: see above.
        overrides: ``key=value`` changes to every recipe; a grid's axes and a variant's own ``set`` come after them.

    Raises:
        RecipeError: no such space, unreadable YAML, a key, recipe, axis or value that is not allowed, or two variants
            of one name.
    """
    name, data = _read(source)
    if not isinstance(data, Mapping) or (unknown := [key for key in data if key not in _KEYS]):
        wrong = f"unknown key {unknown[0]!r}" if isinstance(data, Mapping) else "is no mapping"
        raise RecipeError(f"space {name}: {wrong}; keys are {', '.join(_KEYS)}")
    calibration = data.get("calibration") or {}
    if not isinstance(calibration, Mapping):
        raise RecipeError(f"space {name}: calibration: expected a mapping such as {{samples: 32}}, not {calibration!r}")
    common = [*(f"calibration.{key}={value}" for key, value in calibration.items()), *overrides]
    base = data.get("recipe", "w4-rtn")
    found = [Candidate(ORIGINAL)]
    for grid in _listed(data, "grids"):
        found += _combinations(grid, base, common)
    found += [_variant(entry, common) for entry in _listed(data, "variants")]
    found += [_baseline(entry) for entry in _listed(data, "baselines")]
    if len(found) == 1:
        raise RecipeError(f"space {name}: has no variant; give grids, variants or baselines")
    return Space(str(data.get("name", name)), tuple(_named_apart(found)))


def ready_spaces() -> dict[str, str]:
    """The spaces that ship with quantlab, as text by name."""
    folder = resources.files("quantlab_recipes") / READY
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in files if f.name.endswith(".yaml")}


def _read(source: SpaceSource) -> tuple[str, Any]:
    if isinstance(source, Mapping):
        return "custom", source
    file = Path(source).expanduser()
    if file.is_file():
        try:
            return file.stem, parse_yaml(str(file), file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"space {file} cannot be read: {error}") from error
    ready = ready_spaces()
    if str(source) not in ready:
        raise RecipeError(f"space {str(source)!r} is neither a file nor a ready space; ready are: {', '.join(ready)}")
    return str(source), parse_yaml(str(source), ready[str(source)])


def _listed(data: Mapping[str, Any], key: str) -> Sequence[Any]:
    value = data.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise RecipeError(f"space: {key}: expected a list, not {value!r}")
    return value


def _combinations(grid: Any, base: Any, common: Sequence[str]) -> Iterator[Candidate]:
    if not isinstance(grid, Mapping) or not grid:
        raise RecipeError(f"space: grids: expected mappings of axes to lists, such as {{bits: [3, 4]}}, not {grid!r}")
    wholes = {axis: _values(grid[axis]) for axis in ("recipes", *_RECIPE_AXES) if axis in grid}
    schemes = {axis: values for axis, values in grid.items() if axis not in wholes}
    if unknown := [axis for axis in schemes if axis not in AXES]:
        raise RecipeError(
            f"space: unknown axis {unknown[0]!r}; axes are {', '.join(['recipes', *_RECIPE_AXES, *AXES])}"
        )
    for combination in product(*wholes.values()):
        chosen = dict(zip(wholes, combination, strict=True))
        changes = [f"{_RECIPE_AXES[axis]}={value}" for axis, value in chosen.items() if axis in _RECIPE_AXES]
        recipe = load_recipe(chosen.get("recipes", base), [*common, *changes])
        for variant in expand(schemes, recipe.default) if schemes else ():
            yield Candidate(variant.name, replace(recipe, name=variant.name, description="", default=variant.scheme))
        if not schemes:
            yield Candidate(recipe.name, recipe)


def _values(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _variant(entry: Any, common: Sequence[str]) -> Candidate:
    """A recipe's name or file, or ``{recipe, name, set}``."""
    given = entry if isinstance(entry, Mapping) else {"recipe": entry}
    if not set(given) <= {"recipe", "name", "set"} or "recipe" not in given:
        raise RecipeError(f"space: variants: use a recipe's name, or {{recipe, name, set}}, not {entry!r}")
    changes = [str(change) for change in _values(given.get("set") or [])]
    recipe = load_recipe(given["recipe"], [*common, *changes])
    words = f" ({', '.join(changes)})" if changes else ""
    return Candidate(str(given.get("name", recipe.name + words)), recipe)


def _baseline(entry: Any) -> Candidate:
    name = str(entry)
    if name.endswith(".gguf"):
        if not Path(name).expanduser().is_file():
            raise RecipeError(f"space: baselines: there is no file {name}")
        return Candidate(Path(name).name, baseline=str(Path(name).expanduser().absolute()))
    if split_baseline(f"{name}:model") is None:
        raise RecipeError(
            f"space: baselines: {name!r} is neither a .gguf file nor one of {', '.join(TOOLS)}, as TOOL:KIND"
        )
    return Candidate(name.replace(":", " "), baseline=name)


def _named_apart(candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """The candidates without repetitions; of those with one name, each with what tells it from the others."""
    seen: list[Any] = []
    kept: list[Candidate] = []
    for candidate in candidates:
        if candidate.identity() not in seen:
            seen.append(candidate.identity())
            kept.append(candidate)
    names = [candidate.name for candidate in kept]
    for candidate in kept:
        alike = [other for other in kept if other.name == candidate.name]
        name = candidate.name if len(alike) == 1 else _longer(candidate, alike)
        if name != candidate.name and name in names:
            raise RecipeError(f"space: two variants are called {name!r}; give them names of their own")
        yield replace(candidate, name=name)


def _longer(candidate: Candidate, alike: Sequence[Candidate]) -> str:
    """The name with those of its recipe's parts that differ among `alike`."""
    recipes = [other.recipe for other in alike if other.recipe is not None]
    recipe = candidate.recipe
    assert recipe is not None, "a baseline's name is its identity"
    parts = {
        "transforms": lambda r: "+".join(r.transforms) or "as it is",
        "source": lambda r: f"on {r.calibration.source}",
        "samples": lambda r: f"{r.calibration.samples}x{r.calibration.length}",
        "method": lambda r: method_name(r.default),
        "scales": lambda r: f"{r.default.scale_dtype} scales, {r.default.scale_search}",
        "symmetry": lambda r: "symmetric" if r.default.symmetric else "asymmetric",
    }
    words = [say(recipe) for say in parts.values() if len({say(other) for other in recipes}) > 1]
    place = alike.index(candidate) + 1
    return " ".join([candidate.name, *words]) if words else f"{candidate.name} #{place}"
