"""Formats by name: what a recipe's word for a format means.

Most formats are a table that is known beforehand. A *fitted* format is a family of tables of which one is chosen by
looking at the weights: of one layer, or of all layers that have the format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from quantlab.errors import RecipeError
from quantlab.numerics import tables
from quantlab.numerics.fit import Sample, fit_codebook, fit_power
from quantlab.numerics.grid import Grid

Fit = Callable[[Sequence[Sample]], Grid]


@dataclass(frozen=True)
class Format:
    """What codes of a layer mean, or how that is found.

    Attributes:
        name: what recipes call it.
        bits: width of a code.
        grid: the table, or None if it is fitted.
        fit: of a fitted format, what makes a table of samples of weights.
        network_wide: whether one table is fitted to all layers that have this format.
    """

    name: str
    bits: int
    grid: Grid | None = None
    fit: Fit | None = None
    network_wide: bool = False

    def grid_for(self, sample: Sample) -> Grid:
        """The table for one layer's weight."""
        if self.grid is not None:
            return self.grid
        assert self.fit is not None
        return self.fit([sample])


def _fixed(make: Callable[..., Grid], *arguments: Any) -> Format:
    made = make(*arguments)
    return Format(made.name, made.bits, made)


def _power(bits: int, which: str | None) -> Format:
    if which is None or which == "network":
        name = f"power{bits}" + (":network" if which else "")
        return Format(name, bits, fit=lambda samples: fit_power(bits, samples), network_wide=which == "network")
    exponent = float(which)
    if not 0.1 <= exponent <= 1:
        raise RecipeError(f"format power{bits}:{which}: use an exponent from 0.1 to 1, or leave it out: it is searched")
    return _fixed(tables.power, bits, exponent)


def _minifloat(exponent: int, mantissa: int) -> Format:
    if not 3 <= exponent + mantissa + 1 <= 8:
        raise RecipeError(f"format e{exponent}m{mantissa}: use 3 to 8 bits, the sign counted")
    return _fixed(tables.minifloat, exponent, mantissa)


# A format family: a pattern of the name, what makes a format of its match, and an example.
_FAMILIES: list[tuple[str, Callable[[re.Match[str]], Format], str]] = [
    (r"int([2-8])", lambda m: _fixed(tables.integer, int(m[1])), "int4"),
    (r"int([2-8])-narrow", lambda m: _fixed(tables.narrow_integer, int(m[1])), "int4-narrow"),
    (r"e([1-6])m([0-6])", lambda m: _minifloat(int(m[1]), int(m[2])), "e3m2"),
    (r"nf([2-8])", lambda m: _fixed(tables.normal_float, int(m[1])), "nf4"),
    (r"fp4", lambda _: _fixed(tables.bitsandbytes_fp4), "fp4"),
    (r"power([2-8])(?::(network|[01]?\.?\d+))?", lambda m: _power(int(m[1]), m[2]), "power4"),
    (r"codebook([1-8])", lambda m: Format(m[0], int(m[1]), fit=lambda s: fit_codebook(int(m[1]), s)), "codebook4"),
]


@cache
def format_called(name: str) -> Format:
    """The format that a recipe calls ``name``.

    Raises:
        RecipeError: no format has this name.
    """
    for pattern, make, _ in _FAMILIES:
        if match := re.fullmatch(pattern, name):
            return make(match)
    examples = ", ".join(example for _, _, example in _FAMILIES)
    raise RecipeError(f"format {name!r} is unknown; use a name such as {examples}, with the bits that you want")


def grid(name: str) -> Grid:
    """The table that is called ``name``.

    Raises:
        RecipeError: there is none, or it depends on the weights.
    """
    known = format_called(name).grid
    if known is None:
        raise RecipeError(f"format {name!r} has a table of its own for each weight")
    return known
