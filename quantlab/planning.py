"""Mixed precision: which scheme each layer gets under a budget, from one measured sensitivity."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from quantlab.allocation import SENSITIVITIES, sensitivity_called
from quantlab.allocation.budget import Budget, parse_budget
from quantlab.allocation.choices import Choices, InfeasibleError
from quantlab.allocation.costs import BYTES, CODES, Costs
from quantlab.allocation.items import agreeing
from quantlab.allocation.plan import Option, Plan, PlannedItem
from quantlab.allocation.sensitivity import NATS, VERSION, Sensitivity, read, write
from quantlab.allocation.solvers import solver_called
from quantlab.allocation.task import Task, Tell, as_variant, plan_candidates
from quantlab.checkpoint.gguf import cache_dir
from quantlab.checkpoint.resolve import resolve
from quantlab.checkpoint.source import ModuleSource, open_source, parameter_bytes
from quantlab.engine.architecture import Architecture, describe
from quantlab.engine.calibration import CalibrationText, prepare
from quantlab.errors import PreflightError, RecipeError
from quantlab.recipe import Recipe, load_recipe, matches
from quantlab.variants import Grid, expand

CANDIDATES = "formats=int2,int3,int4,int5,int6,int8,e2m3"
"""What layers choose from if nobody says: otherwise as the recipe has them."""

Model = str | Path | PreTrainedModel


def plan(
    model: Model,
    budget: str | float | Budget,
    *,
    candidates: Grid = CANDIDATES,
    recipe: str | Path | Mapping[str, Any] | Recipe = "w4-gptq",
    overrides: Iterable[str] = (),
    sensitivity: str = "error",
    options: Mapping[str, object] | None = None,
    include: Sequence[str] = (),
    keep: bool = False,
    together: bool = True,
    solver: str = "auto",
    calibration: CalibrationText | None = None,
    tokenizer: Any = None,
    cache: str | Path | None = None,
    tell: Tell | None = None,
) -> Plan:
    """Choose a scheme for every layer of a model, so that little is lost within a budget.

    The result is a recipe: ``quantlab.quantize(model, found.recipe(), out)`` carries it out.

    Args:
        model: a local folder, a ``.gguf`` file, a Hugging Face id, ``demo``, or a model in memory.
        budget: bits a weight, or text, see :func:`quantlab.allocation.budget.parse_budget`.
        candidates: what layers choose from, a grid as :mod:`quantlab.variants` has them.
        recipe: what holds for all candidates, and which text is looked at; layers that it keeps stay as they are.
        overrides: ``key=value`` changes to the recipe.
        sensitivity: one of ``quantlab.allocation.SENSITIVITIES``.
        options: of the sensitivity.
        include: patterns of layers outside the blocks (a head, embeddings) that take part.
        keep: whether a layer may also stay as it is.
        together: layers that one fused kernel would run (q/k/v, gate/up, experts of a block) get the same scheme.
        solver: ``auto``, ``knapsack``, ``milp`` or ``search``.
        calibration: documents, or token ids int64 ``[samples, length]``, instead of the recipe's source.
        tokenizer: for a model in memory; otherwise the model's own is loaded.
        cache: the folder of measured sensitivities; None: in the user's cache.
        tell: told of steps done, steps in all, and what is being done.

    Raises:
        InfeasibleError: says what is feasible.
        QuantlabError: before any work: a budget, grid, recipe, pattern or name that cannot be.
    """
    prepared = prepare_planning(
        model,
        candidates=candidates,
        recipe=recipe,
        overrides=overrides,
        sensitivity=sensitivity,
        options=options,
        include=include,
        keep=keep,
        together=together,
        calibration=calibration,
        tokenizer=tokenizer,
        cache=cache,
        tell=tell,
    )
    wanted = parse_budget(budget)
    prepared.check(wanted)
    return prepared.solve(wanted, solver)


@dataclass(frozen=True, eq=False)
class Planning:
    """Everything but the budget: a measured model, for any number of plans.

    Attributes:
        model: what a person called it.
        task: what was measured.
        base: the recipe.
        method: of the sensitivity.
        items: layers that agree.
        bytes: of each layer under each candidate.
        fixed_bytes: of everything that takes no part.
        file: where the sensitivity is kept.
        identity: what it depends on.
        calibration: how the text came about.
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

    def measured(self) -> tuple[Sensitivity, bool]:
        """The sensitivity, measured now or before; and whether it was there."""
        known = read(self.file, self.identity)
        if known is not None:
            return known, True
        wall, cpu = time.perf_counter(), time.process_time()
        found = sensitivity_called(self.method)(self.task)
        found = replace(
            found,
            identity=self.identity,
            calibration=dict(self.calibration),
            seconds=time.perf_counter() - wall,
            cpu_seconds=time.process_time() - cpu,
        )
        write(self.file, found)
        return found, False

    def costs_for(self, budget: Budget) -> Costs:
        """What a budget limits, of each layer under each candidate; for one of loss, bytes."""
        weights = self.task.weights()
        if budget.kind == "code-bits":
            bits = np.array(self.task.bits) / 8
            codes = {
                name: np.where(np.isfinite(size), bits * weights[name], math.inf) for name, size in self.bytes.items()
            }
            return Costs(CODES, codes, weights=sum(weights.values()))
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
        solve = solver_called(solver)
        if budget.of_loss:
            chosen = self._within_loss(budget, choices, sensitivity, solve)
        else:
            try:
                chosen = solve(choices, costs.limit(budget))
            except InfeasibleError as error:
                raise costs.infeasible(budget, error.least) from error
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
            solver=solver,
            pair_loss=choices.loss(chosen) - own,
            notes=sensitivity.notes,
            seconds=sensitivity.seconds,
            cached=cached,
        )

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


def prepare_planning(
    model: Model,
    *,
    candidates: Grid = CANDIDATES,
    recipe: str | Path | Mapping[str, Any] | Recipe = "w4-gptq",
    overrides: Iterable[str] = (),
    sensitivity: str = "error",
    options: Mapping[str, object] | None = None,
    include: Sequence[str] = (),
    keep: bool = False,
    together: bool = True,
    calibration: CalibrationText | None = None,
    tokenizer: Any = None,
    cache: str | Path | None = None,
    tell: Tell | None = None,
) -> Planning:
    """Everything of :func:`plan` that needs no budget, and no measuring yet. Its arguments are that function's."""
    base = load_recipe(recipe, overrides)
    sensitivity_called(sensitivity)
    if base.transforms:
        raise RecipeError(
            f"recipe {base.name!r} rewrites the model ({', '.join(base.transforms)}), and sensitivities are measured "
            "on it as it is; add --set transforms=none"
        )
    source = ModuleSource(model) if isinstance(model, PreTrainedModel) else open_source(resolve(model))
    skeleton = source.skeleton()
    architecture = describe(skeleton)
    names = _taking_part(base, architecture, include)
    variants = expand(candidates, base.default)
    variants = (*variants, as_variant(base.default)) if keep else variants
    plans, refused = plan_candidates(variants, names, architecture, skeleton)
    if refused:
        number, reason = next(iter(refused.items()))
        raise PreflightError(f"candidate {variants[number].name}: {reason}; leave it out, or use another group size")
    if tokenizer is None and not isinstance(calibration, torch.Tensor):
        tokenizer = source.tokenizer()
    data = prepare(base.calibration, tokenizer, source.config, calibration)
    task = Task(
        source,
        skeleton,
        architecture,
        names,
        variants,
        plans,
        data.tokens,
        tell or (lambda _done, _total, _what: None),
        {"together": together, **(options or {})},
    )
    identity = {
        "version": VERSION,
        "quantlab": metadata.version("quantlab"),
        "method": sensitivity,
        "options": dict(options or {}) | ({} if sensitivity in ("error",) else {"together": together}),
        "model": source.fingerprint(),
        "layers": list(names),
        "candidates": [asdict(variant) for variant in variants],
        "calibration": data.description["sha256"],
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir() / "sensitivities" if cache is None else Path(cache)
    return Planning(
        model=_model_name(model),
        task=task,
        base=base,
        method=sensitivity,
        together=together,
        bytes=task.bytes(),
        fixed_bytes=parameter_bytes(skeleton) - _original_bytes(task),
        file=folder / f"{sensitivity}-{digest}.json",
        identity=identity,
        calibration=data.description,
    )


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


def _taking_part(base: Recipe, architecture: Architecture, include: Sequence[str]) -> tuple[str, ...]:
    """The linear layers of the blocks that the recipe does not keep, and what is asked for beside them."""
    inside = [name for names in architecture.layers.values() for name in names if not base.scheme(name).keeps]
    outside = [*architecture.outside, *architecture.embeddings]
    for pattern in include:
        if not any(matches(pattern, name) for name in outside):
            raise RecipeError(
                f"include {pattern!r}: matches nothing outside the blocks; there are {', '.join(outside) or 'none'}"
            )
    names = (*inside, *(name for name in outside if any(matches(pattern, name) for pattern in include)))
    if not names:
        raise PreflightError(f"recipe {base.name!r} keeps every layer as it is: there is nothing to plan")
    return names


def _original_bytes(task: Task) -> int:
    """Of the layers that take part, a shared weight counted once; an embedding that a head shares stays for it."""
    seen = {id(task.weight(name)): task.weight(name) for name in task.names}
    everywhere = [*task.architecture.all_layers, *task.architecture.embeddings]
    staying = {id(task.weight(name)) for name in everywhere if name not in task.names}
    return sum(weight.numel() * weight.element_size() for key, weight in seen.items() if key not in staying)


def _model_name(model: Model) -> str:
    if isinstance(model, PreTrainedModel):
        return model.config.name_or_path or type(model).__name__
    return str(model)


__all__ = ["CANDIDATES", "SENSITIVITIES", "Planning", "plan", "prepare_planning", "sensitivity_items"]
