"""What a recipe says of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

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
from quantlab.recipe.allowed import check_choice, check_keys

OPTIONS = {"quantizer": "options", "compensation": "compensation_options"}
"""The key under which the options stand of the method that a key names."""

_SEARCHES = ("absmax", "mse", "second-moment")


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
        check_choice("scale_search", self.scale_search, _SEARCHES)
        scale_type(self.scale_dtype)
        check_choice("activations", self.activations, ACTIVATIONS)
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


def changed(scheme: Scheme, changes: Mapping[str, Any], where: str) -> Scheme:
    """``scheme`` with some fields changed; a method's options are added to those that it has, or begin anew with it.

    Raises:
        RecipeError: says ``where``, the key, the value and what is allowed.
    """
    check_keys(changes, {f.name for f in fields(Scheme)}, where)
    values = dict(changes)
    for method, key in OPTIONS.items():
        options = {} if values.get(key) is None else values[key]
        if isinstance(options, Mapping) and values.get(method, getattr(scheme, method)) == getattr(scheme, method):
            options = {**getattr(scheme, key), **options}  # another method's options would mean nothing to this one
        values[key] = options
    try:
        return replace(scheme, **values)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
