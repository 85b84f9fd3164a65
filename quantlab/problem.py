"""What a method is given and what it answers: a layer, what is known of its inputs, and the solution."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from quantlab.errors import MissingStatisticsError
from quantlab.numerics import QTensor
from quantlab.recipe import Scheme


class Statistic(enum.Flag):
    """What a method may ask to be kept of a layer's inputs ``x`` (as rows of tokens)."""

    NONE = 0
    DIAGONAL = enum.auto()  # E[x_j^2]
    SECOND_MOMENT = enum.auto()  # E[x x^T]; its diagonal comes with it
    SHIFT = enum.auto()  # E[(x_o - x) x^T]: x_o is the same token's input in the original model; once more, held out
    MEAN = enum.auto()  # E[x]
    MAGNITUDE = enum.auto()  # max over sequences of E|x_j|


class Rows(Protocol):
    """A float32 matrix that is read and written some rows at a time: a tensor, or one that waits on the disk."""

    @property
    def shape(self) -> torch.Size:
        """Rows and columns."""

    def __getitem__(self, rows: slice, /) -> torch.Tensor: ...

    def __setitem__(self, rows: slice, values: torch.Tensor, /) -> None: ...


PIECE = 512
"""Rows of a matrix that are worked on at once; what is on the disk comes and goes in such pieces."""


def pieces(matrix: Rows) -> Iterator[slice]:
    """The rows of a matrix, some at a time."""
    yield from (slice(start, start + PIECE) for start in range(0, matrix.shape[0], PIECE))


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
        mean: ``E[x]``, float32 ``[in]``.
        magnitude: ``E|x_j|`` of the sequence where it is largest, float32 ``[in]``.
        spare: ``[in, in]`` on the disk, where the second moment can wait while a method works in its memory, to be put
            back as it was; None: there is memory for both.
    """

    tokens: int
    second_moment: torch.Tensor | None = None
    diagonal: torch.Tensor | None = None
    shift: Rows | None = None
    held_out_shift: Rows | None = None
    held_out: float = 0.0
    mean: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    spare: Rows | None = None


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """One linear layer to be quantized, or several that share an input and a scheme, stacked along their outputs.

    Attributes:
        name: for messages.
        weight: float32 ``[out, in]``; in the dtype that it is stored in, and alone, for a method with ``any_dtype``.
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
        target: float32 ``[out, in]``, what the method approximated where that is not the weight itself; else None.
        bias: float32 ``[out]``, to be added to the layer's bias; None if that stays as it is.
    """

    qtensor: QTensor
    loss: torch.Tensor | None = None
    notes: tuple[str, ...] = ()
    target: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def target_for(self, weight: torch.Tensor) -> torch.Tensor:
        """What the method approximated: ``target``, or the layer's ``weight`` itself."""
        return weight if self.target is None else self.target

    def to(self, device: torch.device | str) -> Solution:
        """The same on a device."""
        loss, target, bias = (
            None if tensor is None else tensor.to(device) for tensor in (self.loss, self.target, self.bias)
        )
        return Solution(self.qtensor.to(device), loss, self.notes, target, bias)


_ATTRIBUTES = {
    Statistic.SECOND_MOMENT: "second_moment",
    Statistic.DIAGONAL: "diagonal",
    Statistic.SHIFT: "shift",
    Statistic.MEAN: "mean",
    Statistic.MAGNITUDE: "magnitude",
}


def require(problem: LayerProblem, statistic: Statistic) -> InputStatistics:
    """The problem's statistics, checked to hold what the method declared.

    Raises:
        MissingStatisticsError: they were not collected.
    """
    kept = problem.statistics
    for flag, attribute in _ATTRIBUTES.items():
        if flag in statistic and (kept is None or (kept.tokens and getattr(kept, attribute) is None)):
            raise MissingStatisticsError(
                f"{problem.name}: needs {attribute} of its inputs, which was not collected; run it over calibration "
                "data through quantlab.quantize, or pass InputStatistics"
            )
    return kept if kept is not None else InputStatistics(0)
