"""A measured model as a problem for solvers: budgets in, plans out."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from quantlab_evals.machine import device_name

from quantlab.allocation import bisection, sensitivity_called
from quantlab.allocation.budget import Budget
from quantlab.allocation.choices import Choices, InfeasibleError
from quantlab.allocation.costs import BYTES, CODES, SECONDS, Costs
from quantlab.allocation.evaluated import Evaluated
from quantlab.allocation.items import agreeing
from quantlab.allocation.plan import Option, Plan, PlannedItem
from quantlab.allocation.sensitivity import NATS, Sensitivity, read, write
from quantlab.allocation.solvers import solver_called
from quantlab.allocation.task import Task
from quantlab.engine.architecture import Architecture
from quantlab.engine.device import computing, enough_memory
from quantlab.errors import RecipeError
from quantlab.latency import HERE, Latency, latency
from quantlab.recipe import Recipe, load_recipe

BISECTION = "bisection"
"""The solver that evaluates choices instead of believing predictions."""

_REMEDY = (
    "end what else is on the device, use fewer calibration tokens, or sensitivity error with coefficients none, which "
    "holds one block, or --device cpu"
)


@dataclass(frozen=True, eq=False)
class Planning:
    """Everything but the budget: a measured model, for any number of plans.

    Attributes:
        model: what a person called it.
        task: what was measured.
        base: the recipe.
        method: of the sensitivity.
        together: whether layers of one fused kernel agree.
        bytes: of each layer under each candidate.
        fixed_bytes: of everything that takes no part.
        file: where the sensitivity is kept.
        identity: what it depends on.
        calibration: how the text came about.
        seconds_of: a device; None: nobody asks, or ``here``.
    """

    model: str
    task: Task
    base: Recipe
    method: str
    together: bool
    bytes: Mapping[str, np.ndarray]
    fixed_bytes: int
    file: Path
    identity: Mapping[str, Any]
    calibration: Mapping[str, Any]
    seconds_of: str | None = None

    @cached_property
    def latency(self) -> Latency:
        """Seconds of each layer under each candidate, measured or computed when they are first asked for."""
        with enough_memory(_REMEDY):
            return latency(self.task, self.seconds_of or HERE)

    def measured(self) -> tuple[Sensitivity, bool]:
        """The sensitivity, measured now or before; and whether it was there."""
        known = read(self.file, self.identity)
        if known is not None:
            return known, True
        wall, cpu = time.perf_counter(), time.process_time()
        with computing(_REMEDY):
            found = sensitivity_called(self.method)(self.task)
        device = self.task.source.device
        found = replace(
            found,
            notes=(*found.notes, *([] if device.type == "cpu" else [f"measured on {device_name(device)}"])),
            identity=self.identity,
            calibration=dict(self.calibration),
            seconds=time.perf_counter() - wall,
            cpu_seconds=time.process_time() - cpu,
        )
        write(self.file, found)
        return found, False

    def costs_for(self, budget: Budget) -> Costs:
        """What a budget limits, of each layer under each candidate; for one of loss, what is to be small."""
        weights = self.task.weights()
        if budget.kind == "code-bits":
            bits = np.array(self.task.bits) / 8
            codes = {
                name: np.where(np.isfinite(size), bits * weights[name], math.inf) for name, size in self.bytes.items()
            }
            return Costs(CODES, codes, weights=sum(weights.values()))
        if budget.kind == "seconds" or (budget.of_loss and self.seconds_of is not None):
            return Costs(SECONDS, self.latency.by_layer, sum(weights.values()), self.latency.fixed)
        return Costs(BYTES, self.bytes, weights=sum(weights.values()), fixed=self.fixed_bytes)

    def check(self, budget: Budget) -> None:
        """Refuse what cannot be before anything is measured.

        Raises:
            InfeasibleError: sizes alone say that it is below what the smallest candidates take.
        """
        if not budget.of_loss:
            costs = self.costs_for(budget)
            least = sum(float(of_layer.min()) for of_layer in costs.by_layer.values())
            if least > costs.limit(budget):
                raise costs.infeasible(budget, least)

    def solve(self, budget: Budget, solver: str = "auto") -> Plan:
        """A plan for a budget; measures if nobody has.

        Raises:
            InfeasibleError: says what is feasible.
        """
        sensitivity, cached = self.measured()
        items = sensitivity_items(sensitivity, self.task, self.together)
        losses = sensitivity.of_items(items)
        costs = self.costs_for(budget)
        found = costs.of_items(items)
        losses = np.where(np.isfinite(found), losses, math.inf)
        choices = Choices(losses, np.nan_to_num(found, posinf=0.0), sensitivity.pairs_of_items(items))
        if solver == BISECTION:
            return self._bisected(budget, items, choices, sensitivity, cached)
        solve = solver_called(solver)
        if budget.of_loss:
            chosen = self._within_loss(budget, choices, sensitivity, solve)
        else:
            try:
                chosen = solve(choices, costs.limit(budget))
            except InfeasibleError as error:
                raise costs.infeasible(budget, error.least) from error
        return self._plan(budget, items, chosen, choices, sensitivity, solver=solver, cached=cached)

    def _plan(
        self,
        budget: Budget,
        items: Sequence[tuple[str, ...]],
        chosen: Sequence[int],
        choices: Choices,
        sensitivity: Sensitivity,
        **how: Any,
    ) -> Plan:
        costs = self.costs_for(budget)
        own = float(choices.losses[np.arange(len(items)), list(chosen)].sum())
        return Plan(
            model=self.model,
            budget=str(budget),
            cost_unit=costs.unit,
            method=self.method,
            unit=sensitivity.unit,
            items=self._items(items, chosen, choices),
            schemes={candidate.name: candidate.scheme for candidate in sensitivity.candidates},
            base=self.base,
            fixed_bytes=self.fixed_bytes,
            pair_loss=choices.loss(chosen) - own,
            fixed_cost=costs.fixed if costs.unit == SECONDS else 0.0,
            notes=(*sensitivity.notes, *([self.latency.source] if costs.unit == SECONDS else [])),
            seconds=sensitivity.seconds,
            **how,
        )

    def _bisected(
        self,
        budget: Budget,
        items: Sequence[tuple[str, ...]],
        choices: Choices,
        sensitivity: Sensitivity,
        cached: bool,
    ) -> Plan:
        """Within a loss that is measured, not predicted."""
        if budget.kind != "loss":
            raise RecipeError(f"budget {budget}: the bisection keeps a tolerance that it measures: loss=0.05 or ppl=2%")
        known: dict[tuple[int, ...], float] = {}
        with computing(_REMEDY):
            evaluated = Evaluated(self.task, items)

            def holds(chosen: Sequence[int]) -> bool:
                if tuple(chosen) not in known:
                    known[tuple(chosen)] = evaluated.loss(chosen)
                return known[tuple(chosen)] <= budget.limit

            chosen = bisection.search(choices, holds)
        plan = self._plan(budget, items, chosen, choices, sensitivity, solver=BISECTION, cached=cached)
        return replace(plan, measured=known[chosen], notes=(*plan.notes, f"{evaluated.evaluations} real evaluations"))

    def _items(
        self, items: Sequence[tuple[str, ...]], chosen: Sequence[int], choices: Choices
    ) -> tuple[PlannedItem, ...]:
        weights, every = self.task.weights(), Costs(BYTES, self.bytes).of_items(items)
        planned = []
        for number, members in enumerate(items):
            possible = [k for k in range(len(self.task.candidates)) if math.isfinite(choices.losses[number, k])]
            options = tuple(
                Option(
                    candidate=self.task.candidates[k].name,
                    loss=float(choices.losses[number, k]),
                    cost=float(choices.costs[number, k]),
                    bytes=int(every[number, k]),
                    bits=self.task.bits[k],
                )
                for k in possible
            )
            count = sum(weights[name] for name in members)
            planned.append(PlannedItem(members, count, possible.index(chosen[number]), options))
        return tuple(planned)

    def _within_loss(self, budget: Budget, choices: Choices, sensitivity: Sensitivity, solve: Any) -> Sequence[int]:
        """The smallest choice within a loss: its own, or that of a recipe (L-GreCo's form, arXiv:2210.17357)."""
        if choices.pairs:
            raise RecipeError("a budget of loss is solved without pairs of layers; use another sensitivity")
        if budget.kind == "like":
            limit = self._loss_like(budget.recipe, sensitivity)
        elif sensitivity.unit != NATS:
            raise RecipeError(
                f"budget {budget}: sensitivity {self.method} orders layers and predicts no loss; use error or kl, or "
                "like=RECIPE"
            )
        else:
            limit = budget.limit
        try:
            return solve(choices.swapped(), limit)
        except InfeasibleError as error:
            raise InfeasibleError(
                f"budget {budget}: the best candidates are predicted to lose {error.least:.4g}; ask for as much, or "
                "add a larger candidate, or --keep, with which a layer may stay as it is",
                error.least,
            ) from error

    def _loss_like(self, recipe: str, sensitivity: Sensitivity) -> float:
        reference = load_recipe(recipe)
        numbers = {candidate.scheme.format: k for k, candidate in enumerate(sensitivity.candidates)}
        total = 0.0
        for unit in sensitivity.units:
            wanted = reference.scheme(unit.layers[0]).format
            if wanted not in numbers:
                raise RecipeError(f"budget like={recipe}: its format {wanted} is no candidate; add it")
            total += unit.losses[numbers[wanted]]
        return total


def sensitivity_items(sensitivity: Sensitivity, task: Task, together: bool) -> tuple[tuple[str, ...], ...]:
    """Layers that get the same scheme."""
    if together:
        return agreeing(sensitivity.groups, task.architecture, task.tied)
    return agreeing(
        [(name,) for group in sensitivity.groups for name in group], _unrouted(task.architecture), task.tied
    )


def _unrouted(architecture: Architecture) -> Architecture:
    """Experts as layers like any other."""
    return replace(architecture, routed=frozenset())
