"""What a rounding method is: its problem, its answer, its protocol, and the registry."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from quantlab.errors import MissingStatisticsError, RecipeError
from quantlab.numerics import QTensor
from quantlab.recipe import Scheme


class Statistic(enum.Flag):
    """What a method may ask to be kept of a layer's inputs ``x`` (as rows of tokens)."""

    NONE = 0
    DIAGONAL = enum.auto()  # E[x_j^2]
    SECOND_MOMENT = enum.auto()  # E[x x^T]; its diagonal comes with it
    SHIFT = enum.auto()  # E[(x_o - x) x^T]: x_o is the same token's input in the original model; once more, held out


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """What was kept of the inputs of one or several layers; what nobody asked for is None.

    Attributes:
        tokens: how many inputs were seen; 0 if none (an expert that no token was routed to).
        second_moment: ``E[x x^T]``, float32 ``[in, in]``.
        diagonal: ``E[x_j^2]``, float32 ``[in]``.
        shift: ``E[(x_o - x) x^T]``, float32 ``[in, in]``, x_o from the original model and x from the quantized.
        held_out_shift: the same over a held-out part of these tokens; None if there were too few.
        held_out: that part's share of the tokens of ``shift``.
    """

    tokens: int
    second_moment: torch.Tensor | None = None
    diagonal: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    held_out_shift: torch.Tensor | None = None
    held_out: float = 0.0


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """One linear layer to be quantized, or several that share an input and a scheme, stacked along their outputs.

    Attributes:
        name: for messages.
        weight: float32 ``[out, in]``.
        statistics: of its inputs, or None where the method needs none.
    """

    name: str
    weight: torch.Tensor
    statistics: InputStatistics | None = None

    def importance(self, scheme: Scheme) -> torch.Tensor | None:
        """``E[x_j^2]`` where the scheme's scale search is weighted by it and inputs were seen, else None."""
        if scheme.scale_search != "second-moment" or self.statistics is None or self.statistics.tokens == 0:
            return None
        return self.statistics.diagonal


@dataclass(frozen=True, eq=False)
class Solution:
    """A method's answer.

    Attributes:
        qtensor: the quantized weight.
        loss: float32 ``[out]``, the diagonal of ``E H E^T`` for the error ``E`` against the method's target and the
            second moment ``H``, where the method knows it without computing it again; else None.
        notes: what a person should know: a fallback, a raised damping.
    """

    qtensor: QTensor
    loss: torch.Tensor | None = None
    notes: tuple[str, ...] = ()


class Quantizer(Protocol):
    """A rounding method. An implementation is a frozen dataclass whose fields are its options."""

    name: ClassVar[str]

    def needs(self, scheme: Scheme) -> Statistic:
        """Which statistics of the inputs :meth:`quantize` wants under this scheme."""
        ...

    def quantize(self, problem: LayerProblem, scheme: Scheme) -> Solution:
        """Choose the codes."""
        ...


_REGISTRY: dict[str, type[Quantizer]] = {}
_Q = TypeVar("_Q", bound=type)


def register(name: str) -> Callable[[_Q], _Q]:
    """Enter a quantizer under the name that recipes use."""

    def enter(cls: _Q) -> _Q:
        cls.name = name  # type: ignore[attr-defined]
        _REGISTRY[name] = cls
        return cls

    return enter


def quantizer_names() -> list[str]:
    """The registered methods."""
    return sorted(_REGISTRY)


def make_quantizer(name: str, options: Mapping[str, Any]) -> Quantizer:
    """The method called ``name`` with these options.

    Raises:
        RecipeError: no such method, an option that it does not have, or a value that it refuses.
    """
    if name not in _REGISTRY:
        raise RecipeError(f"quantizer {name!r} is unknown; use one of {', '.join(quantizer_names())}")
    cls: Any = _REGISTRY[name]
    known = [f.name for f in dataclasses.fields(cls)]
    for option in options:
        if option not in known:
            has = f"its options are {', '.join(known)}" if known else "it has no options"
            raise RecipeError(f"quantizer {name!r} has no option {option!r}; {has}")
    return cls(**options)


def require(problem: LayerProblem, statistic: Statistic) -> InputStatistics:
    """The problem's statistics, checked to hold what the method declared.

    Raises:
        MissingStatisticsError: they were not collected.
    """
    kept = problem.statistics
    wanted = {Statistic.SECOND_MOMENT: "second_moment", Statistic.DIAGONAL: "diagonal", Statistic.SHIFT: "shift"}
    for flag, attribute in wanted.items():
        if flag in statistic and (kept is None or (kept.tokens and getattr(kept, attribute) is None)):
            raise MissingStatisticsError(
                f"{problem.name}: needs {attribute} of its inputs, which was not collected; run it over calibration "
                "data through quantlab.quantize, or pass InputStatistics"
            )
    return kept if kept is not None else InputStatistics(0)
