"""What a run tells of itself while it works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from quantlab.engine.architecture import Architecture
from quantlab.engine.report import LayerReport
from quantlab.engine.solve import PlannedLayer
from quantlab.recipe import Recipe


@dataclass(frozen=True)
class Start:
    """What is about to be done.

    Attributes:
        recipe: what was asked for.
        architecture: the model's parts.
        plan: the layers that will be quantized.
        calibration: how the calibration data came about; empty if none is needed.
        resumed: blocks that an earlier, interrupted run finished.
        variants: how many times each layer is quantized, one way after the other.
        notes: what a person should know of the model as a whole.
    """

    recipe: Recipe
    architecture: Architecture
    plan: dict[str, PlannedLayer]
    calibration: dict[str, Any]
    resumed: tuple[str, ...]
    variants: int = 1
    notes: tuple[str, ...] = ()


class Progress(Protocol):
    """Whoever wants to be told."""

    def start(self, start: Start) -> None:
        """Everything is checked, work begins."""

    def block(self, name: str) -> None:
        """A block is being loaded; an empty name stands for what is outside the blocks."""

    def layer(self, report: LayerReport) -> None:
        """A layer is done."""

    def finish(self) -> None:
        """The result is in its place."""


class Silent:
    """Tells nobody."""

    def start(self, start: Start) -> None:
        """Nothing."""

    def block(self, name: str) -> None:
        """Nothing."""

    def layer(self, report: LayerReport) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""
