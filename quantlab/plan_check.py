"""Predictions put to the test: plans really quantized and measured, one or some of a whole curve."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.allocation.budget import Budget
from quantlab.allocation.plan import Plan
from quantlab.allocation.task import Tell
from quantlab.engine.calibration import CalibrationText
from quantlab.engine.quantize import quantize
from quantlab.errors import RecipeError
from quantlab.evaluation import evaluate
from quantlab.plan_problem import Planning
from quantlab.planning import Model


@dataclass(frozen=True)
class Check:
    """How a plan is measured.

    Attributes:
        model: the original.
        text: that divergence is measured on: not the one of calibration.
        windows: of it, from the start; None: all.
        length: tokens in a window; None: as :func:`quantlab.evaluate` has it.
        calibration: instead of the recipe's source.
        tokenizer: for a model in memory.
        device: where plans are quantized and measured, see :func:`quantlab.engine.device.choose_placement`.
    """

    model: Model
    text: str | Sequence[str] = "builtin:eval"
    windows: int | None = 8
    length: int | None = None
    calibration: CalibrationText | None = None
    tokenizer: Any = None
    device: str = "cpu"

    def measure(self, plan: Plan) -> Plan:
        """The plan with what it really loses: quantized into a temporary folder, and measured against the original."""
        with tempfile.TemporaryDirectory(prefix="quantlab-") as folder:
            out = Path(folder) / "out"
            quantize(
                self.model,
                plan.recipe(),
                out,
                calibration=self.calibration,
                tokenizer=self.tokenizer,
                device=self.device,
            )
            found = evaluate(
                str(out),
                self.text,
                against=self.model,
                length=self.length,
                windows=self.windows,
                device=None if self.device == "cpu" else self.device,
                tokenizer=self.tokenizer,
            )
        assert found.divergence is not None
        return replace(plan, measured=found.divergence.kl)


@dataclass(frozen=True)
class Curve:
    """Plans over all budgets, from one sensitivity; some of them measured.

    Attributes:
        plans: fewest bytes first.
    """

    plans: tuple[Plan, ...]

    @property
    def checked(self) -> tuple[Plan, ...]:
        """Those that were really quantized and measured."""
        return tuple(plan for plan in self.plans if plan.measured is not None)

    @property
    def ratio(self) -> float | None:
        """Measured over predicted loss: the median of the checked plans. None if none is, or nothing is predicted."""
        ratios = self.ratios
        return statistics.median(ratios) if ratios else None

    @property
    def ratios(self) -> list[float]:
        """Measured over predicted, of each checked plan."""
        return [plan.measured / plan.loss for plan in self.checked if plan.measured and plan.predicts and plan.loss > 0]

    @property
    def error(self) -> float | None:
        """How far predictions are off, once multiplied by :attr:`ratio`: the largest, as a fraction."""
        ratio = self.ratio
        if ratio is None or len(self.ratios) < 2:
            return None
        return max(max(found / ratio, ratio / found) for found in self.ratios) - 1

    def to_dict(self) -> dict[str, Any]:
        """A JSON mapping: a record a plan, without its items."""
        keys = ("budget", "method", "unit", "loss", "measured", "bytes", "bits", "code_bits", "cost", "cost_unit")
        return {
            "plans": [{key: getattr(plan, key) for key in keys} for plan in self.plans],
            "ratio": self.ratio,
            "error": self.error,
        }


def curve(
    planning: Planning,
    *,
    points: int = 17,
    check: Check | None = None,
    checked: int = 3,
    solver: str = "auto",
    tell: Tell | None = None,
) -> Curve:
    """Plans for budgets spread evenly from the smallest that is possible to the largest, in bits a weight.

    Args:
        planning: a measured model, or one that will be.
        points: budgets.
        check: how to measure; None: nothing is.
        checked: how many plans are quantized and measured: spread over the curve's middle, where a budget is a choice.
        solver: as in :func:`quantlab.plan`.
        tell: told of each measured plan.

    Raises:
        RecipeError: fewer than two points.
    """
    if type(points) is not int or points < 2:
        raise RecipeError(f"points {points!r}: a curve has two or more")
    weights = sum(planning.task.weights().values())
    sizes = [of_layer[np.isfinite(of_layer)] for of_layer in planning.bytes.values()]
    low, high = (8 * sum(float(pick(size)) for size in sizes) / weights for pick in (np.min, np.max))
    limits = np.linspace(math.ceil(low * 1000) / 1000, high, points)
    plans = [planning.solve(Budget("bits", round(float(limit), 3)), solver) for limit in limits]
    if check is not None:
        # Evenly over predicted losses' logarithms, inside the ends.
        for number, place in enumerate(_spread([plan.loss for plan in plans], checked)):
            if tell is not None:
                tell(number, checked, f"quantizing and measuring the plan of {plans[place].budget}")
            plans[place] = check.measure(plans[place])
    return Curve(tuple(plans))


def _spread(losses: Sequence[float], count: int) -> list[int]:
    """Places of so many plans, whose losses are spread evenly in ratio."""
    inner = range(1, len(losses) - 1)
    if count >= len(inner):
        return list(inner)
    logs = [math.log(max(loss, 1e-12)) for loss in losses]
    top, bottom = logs[1], logs[len(logs) // 2]
    wanted = [top + (bottom - top) * (k + 0.5) / count for k in range(count)]
    return sorted({min(inner, key=lambda place: abs(logs[place] - target)) for target in wanted})
