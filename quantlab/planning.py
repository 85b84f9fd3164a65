"""Mixed precision: which scheme each layer gets under a budget, from one measured sensitivity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from quantlab.allocation import OF_ITEMS, sensitivity_called
from quantlab.allocation.budget import Budget, parse_budget
from quantlab.allocation.plan import Plan
from quantlab.allocation.sensitivity import VERSION
from quantlab.allocation.task import Task, Tell, as_variant, plan_candidates
from quantlab.checkpoint.cache import cache_dir
from quantlab.checkpoint.on_device import DeviceSource
from quantlab.checkpoint.resolve import Model, name_of, source_of
from quantlab.checkpoint.source import parameter_bytes
from quantlab.devices import device_names
from quantlab.engine.architecture import Architecture, describe
from quantlab.engine.calibration import CalibrationData, CalibrationText, prepare
from quantlab.engine.device import choose_device
from quantlab.errors import PreflightError, RecipeError
from quantlab.latency import HERE
from quantlab.plan_problem import Planning
from quantlab.recipe import Recipe, load_recipe, matches
from quantlab.variants import Grid, expand

CANDIDATES = "formats=int2,int3,int4,int5,int6,int8,e2m3"
"""What layers choose from if nobody says: otherwise as the recipe has them."""


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
    device: str | torch.device | None = None,
    latency: str | None = None,
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
        solver: ``auto``, ``knapsack``, ``milp`` or ``search``; ``bisection`` really evaluates, for a budget of loss.
        device: where the model is measured: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: a GPU if there is one. What
            ``latency`` takes is taken for that, where that is not given: it once went by this name.
        latency: what seconds are of: ``here``, measured on ``device``, or a device whose roofline is taken, see
            :func:`quantlab.devices.device_called`. With a budget of loss: the fastest plan, not the smallest. None:
            ``here``, if seconds are asked for.
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
        device=device,
        latency=latency,
        calibration=calibration,
        tokenizer=tokenizer,
        cache=cache,
        tell=tell,
    )
    wanted = parse_budget(budget)
    prepared.check(wanted)
    return prepared.solve(wanted, solver)


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
    device: str | torch.device | None = None,
    latency: str | None = None,
    calibration: CalibrationText | None = None,
    tokenizer: Any = None,
    cache: str | Path | None = None,
    tell: Tell | None = None,
) -> Planning:
    """Everything of :func:`plan` that needs no budget, and no measuring yet. Its arguments are that function's."""
    if latency is None and isinstance(device, str) and _is_of_seconds(device):
        device, latency = None, device
    where = choose_device("cpu" if device is None else device)
    base = load_recipe(recipe, overrides)
    sensitivity_called(sensitivity)
    if base.transforms:
        raise RecipeError(
            f"recipe {base.name!r} rewrites the model ({', '.join(base.transforms)}), and sensitivities are measured "
            "on it as it is; add --set transforms=none"
        )
    source = DeviceSource(source_of(model), where)
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
        data.tokens.to(where),
        tell or (lambda _done, _total, _what: None),
        {"together": together, **(options or {})},
    )
    identity = _identity(task, sensitivity, data)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir() / "sensitivities" if cache is None else Path(cache)
    return Planning(
        model=name_of(model),
        task=task,
        base=base,
        method=sensitivity,
        together=together,
        bytes=task.bytes(),
        fixed_bytes=parameter_bytes(skeleton) - _original_bytes(task),
        file=folder / f"{sensitivity}-{digest}.json",
        identity=identity,
        calibration=data.description,
        seconds_of=latency,
    )


def _is_of_seconds(device: str) -> bool:
    """Whether a name is one of devices that seconds are of, not one of torch's; ``cpu`` is both."""
    name, parenthesis, _ = device.partition("(")
    return bool(parenthesis) or name.strip() in (HERE, *device_names())


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


def _identity(task: Task, sensitivity: str, data: CalibrationData) -> dict[str, Any]:
    """What a measured sensitivity depends on."""
    # Whether layers stay together matters only to a sensitivity that measures them together.
    options = {key: value for key, value in task.options.items() if key != "together" or sensitivity in OF_ITEMS}
    return {
        "version": VERSION,
        "quantlab": metadata.version("quantlab"),
        "method": sensitivity,
        "options": options,
        "model": task.source.fingerprint(),
        "layers": list(task.names),
        "candidates": [asdict(candidate) for candidate in task.candidates],
        "calibration": data.description["sha256"],
        **({} if task.source.device.type == "cpu" else {"device": task.source.device.type}),
    }


def _original_bytes(task: Task) -> int:
    """Of the layers that take part, a shared weight counted once; an embedding that a head shares stays for it."""
    seen = {id(task.weight(name)): task.weight(name) for name in task.names}
    everywhere = [*task.architecture.all_layers, *task.architecture.embeddings]
    staying = {id(task.weight(name)) for name in everywhere if name not in task.names}
    return sum(weight.numel() * weight.element_size() for key, weight in seen.items() if key not in staying)
