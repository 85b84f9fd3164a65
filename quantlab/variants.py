"""Grids of schemes: every combination of some choices on a recipe's axes.

A grid is a line of text, ``formats=int4,nf4 quantizers=rtn,gptq(damping=0.05) compensation=none,qera-exact:16``, a
mapping of axes to lists, or a YAML file that holds such a mapping. Options of a method stand in parentheses; a value
after a colon is its first option. An axis that is not named keeps the recipe's value. ``bits`` goes with families of
formats: ``formats=int,nf bits=3,4`` is int3, int4, nf3 and nf4.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from quantlab.compensation import compensation_options, make_compensation
from quantlab.errors import RecipeError
from quantlab.numerics import format_called
from quantlab.quantizers import make_quantizer, quantizer_options
from quantlab.recipe import Scheme, changed, parse_yaml

Grid = str | Path | Mapping[str, Any]

# What a grid calls an axis, and the field of a scheme that it sets; bits are a part of the format.
AXES = {
    "formats": "format",
    "bits": "bits",
    "groups": "granularity",
    "quantizers": "quantizer",
    "compensation": "compensation",
    "scales": "scale_dtype",
    "search": "scale_search",
    "symmetric": "symmetric",
}
# Axes of methods: where their options stand in a scheme, and which they are.
_METHODS: dict[str, tuple[str, Callable[[str], list[str]]]] = {
    "quantizer": ("options", quantizer_options),
    "compensation": ("compensation_options", compensation_options),
}
_EXAMPLE = 'for example --grid "formats=int4,nf4 groups=64,channel"'
# A word, or an item of a list: whatever stands in parentheses belongs to it.
_WORD = r"(?:[^\s()]|\([^()]*\))+"
_ITEM = r"(?:[^,()]|\([^()]*\))+"


@dataclass(frozen=True)
class Variant:
    """A scheme under the name that tells it from the others of its grid: ``int4/64 gptq + qera-exact(rank=16)``."""

    name: str
    scheme: Scheme


def expand(grid: Grid, base: Scheme) -> tuple[Variant, ...]:
    """Every combination of a grid, in the order in which it is written: the last axis changes fastest.

    Args:
        grid: see above.
        base: what holds on the axes that the grid does not name.

    Raises:
        RecipeError: an axis, value, method or option that does not exist. Whether a combination can be carried out is
            not asked here.
    """
    axes = [[_changes(axis, item) for item in items] for axis, items in _read(grid).items()]
    schemes: list[Scheme] = []
    for combination in product(*axes):
        scheme = base
        for changes in _sized(combination, base):
            scheme = changed(scheme, changes, "the grid")
        if scheme.keeps:
            raise RecipeError("the grid: format none leaves a layer as it is, which has no error; leave it out")
        make_quantizer(scheme.quantizer, scheme.options)
        if scheme.compensation != "none":
            make_compensation(scheme.compensation, scheme.compensation_options)
        if scheme not in schemes:
            schemes.append(scheme)
    return tuple(Variant(_name(scheme, base, schemes), scheme) for scheme in schemes)


def _sized(combination: Iterable[dict[str, Any]], base: Scheme) -> list[dict[str, Any]]:
    """The changes of a combination, its bits made a part of its format."""
    changes = list(combination)
    bits = next((change["bits"] for change in changes if "bits" in change), None)
    if bits is None:
        return changes
    named = next((change["format"] for change in changes if "format" in change), base.format)
    family = re.sub(r"\d+$", "", str(named))
    rest = [change for change in changes if not {"bits", "format"} & set(change)]
    sized = f"{family}{bits}"
    if str(format_called(sized).bits) != str(bits):  # e2m3 with 4 would be e2m4
        raise RecipeError(f"grid: bits={bits}: {named} has one width; use a family, such as int, nf, power or codebook")
    return [{"format": sized}, *rest]


def method_name(scheme: Scheme, base: Scheme | None = None) -> str:
    """How a scheme rounds and repairs: ``gptq(damping=0.05) + qera-exact(rank=16)``.

    Options that are those of ``base`` are left out.
    """
    parts = []
    for axis, (options, _) in _METHODS.items():
        method, chosen = getattr(scheme, axis), getattr(scheme, options)
        if method == "none":
            continue
        usual = base is not None and (method, chosen) == (getattr(base, axis), getattr(base, options))
        spelled = ",".join(f"{key}={_spelled(value)}" for key, value in chosen.items())
        parts.append(f"{method}({spelled})" if spelled and not usual else method)
    return " + ".join(parts)


def _name(scheme: Scheme, base: Scheme, schemes: Iterable[Scheme]) -> str:
    def vary(field: str) -> bool:
        return len({getattr(other, field) for other in schemes}) > 1

    words = [f"{scheme.format}/{scheme.granularity}", method_name(scheme, base)]
    words += [f"{scheme.scale_dtype} scales"] if vary("scale_dtype") else []
    words += [scheme.scale_search] if vary("scale_search") else []
    words += ["symmetric" if scheme.symmetric else "asymmetric"] if vary("symmetric") else []
    return " ".join(words)


def _read(grid: Grid) -> dict[str, list[Any]]:
    """A grid in any of its shapes as lists by axis."""
    found: Any = grid
    if isinstance(grid, Path) or (isinstance(grid, str) and "=" not in grid):
        file = Path(grid)
        if not file.is_file():
            raise RecipeError(f"grid {str(grid)!r}: neither axis=value,... nor a YAML file; {_EXAMPLE}")
        try:
            found = parse_yaml(str(file), file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"grid {file} cannot be read: {error}") from error
    elif isinstance(grid, str):
        found = _parse(grid)
    if not isinstance(found, Mapping) or not found:
        raise RecipeError(f"grid {found!r}: use a mapping of axes to lists, or text; {_EXAMPLE}")
    lists = {}
    for axis, items in found.items():
        if axis not in AXES:
            raise RecipeError(f"grid: unknown axis {axis!r}; axes are {', '.join(AXES)}")
        lists[axis] = list(items) if isinstance(items, list | tuple) else [items]
        if not lists[axis]:
            raise RecipeError(f"grid: axis {axis!r} has no values; leave it out to keep the recipe's")
    return lists


def _parse(text: str) -> dict[str, list[str]]:
    if left := re.sub(_WORD, "", text).strip():
        raise RecipeError(f"grid {text!r}: {left!r} is not closed or never opened")
    axes: dict[str, list[str]] = {}
    for word in re.findall(_WORD, re.sub(r"\s*([,=])\s*", r"\1", text)):
        axis, equals, values = word.partition("=")
        if not equals:
            raise RecipeError(f"grid: {word!r} is not axis=value,...; {_EXAMPLE}")
        axes.setdefault(axis, []).extend(re.findall(_ITEM, values))
    return axes


def _changes(axis: str, item: Any) -> dict[str, Any]:
    """What one value of an axis changes in a scheme."""
    field = AXES[axis]
    if field not in _METHODS:
        written = isinstance(item, str) and field in ("granularity", "symmetric")
        return {field: parse_yaml(f"grid: {axis}={item}", item) if written else item}
    method, options = _method(axis, item)
    return {field: method, **({_METHODS[field][0]: options} if options else {})}


def _method(axis: str, item: Any) -> tuple[Any, dict[str, Any]]:
    """A method and its options: ``gptq``, ``gptq(damping=0.05,order=natural)``, ``lorc:16``, ``{gptq: {...}}``."""
    if isinstance(item, Mapping) and len(item) == 1:
        ((method, options),) = item.items()
        return method, dict(options or {})
    match = re.fullmatch(r"([^\s():]+)(?:\((.*)\)|:(.+))?", item) if isinstance(item, str) else None
    if match is None:
        raise RecipeError(f"grid: {axis}={item}: use a method's name, with options as in gptq(damping=0.05)")
    method, inside, first = match.groups()
    if first is not None:
        names = _METHODS[AXES[axis]][1](method)
        if not names:
            raise RecipeError(f"grid: {axis}={item}: {method} has no options; use {method}")
        return method, {names[0]: parse_yaml(f"grid: {axis}={item}", first)}
    options = {}
    for setting in re.split(r",\s*(?=[\w.-]+\s*=)", inside) if inside else ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise RecipeError(f"grid: {axis}={item}: {setting!r} is not option=value")
        options[key.strip()] = parse_yaml(f"grid: {axis}={item}", value)
    return method, options


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
