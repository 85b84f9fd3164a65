"""What a run will take, before it begins: memory by what it is for, disk, and time from timing one layer."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from torch import nn

from quantlab.checkpoint.source import ModelSource
from quantlab.engine.architecture import OUTSIDE, Architecture, get_weight
from quantlab.engine.footprint import planned_storage, stored_bytes
from quantlab.engine.needs import Memory, Needs
from quantlab.engine.solve import PlannedLayer, solve
from quantlab.engine.statistics import InputAccumulator
from quantlab.errors import PreflightError
from quantlab.problem import Statistic

Plan = dict[str, PlannedLayer]

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_FLOAT = 4
# Weights that a method works on at once, and how many copies of them it makes, about.
_CHUNK = 1 << 23
_COPIES = 8
# Tokens that are timed: enough to tell, few enough to wait for.
_TIMED_TOKENS = 512


@dataclass(frozen=True)
class Estimate:
    """What a run would do and take.

    Attributes:
        layers: how many layers get which scheme, by the scheme in words.
        blocks: of the model.
        memory: at the peak.
        on_device: memory of the device that blocks are computed on, at the peak; None if that is the CPU.
        disk: bytes of the result.
        spilled: bytes of batches and statistics on disk while it runs.
        seconds: about, from timing one layer on this machine.
        timed: which layer that was.
        calibration: how the calibration data came about; empty if none is needed.
        bits: bits a weight over the layers that are quantized, about.
        device: what torch calls it.
    """

    layers: dict[str, int]
    blocks: int
    memory: Memory
    on_device: Memory | None
    disk: int
    spilled: int
    seconds: float
    timed: str
    calibration: dict[str, Any]
    bits: float
    device: str

    def to_dict(self) -> dict[str, Any]:
        """A JSON mapping."""
        parts = {"memory": self.memory, "on_device": self.on_device}
        return asdict(self) | {name: m and {**asdict(m), "total": m.total} for name, m in parts.items()}


def parse_bytes(text: str | int) -> int:
    """Bytes, from a number of them or words like ``2GB`` (10^9) and ``1.5GiB`` (2^30).

    Raises:
        PreflightError: it is neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b|)\s*", str(text).lower())
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise PreflightError(f"memory {text!r}: use a size like 2GB, 1500MB or 1.5GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def memory_needs(plan: Plan, architecture: Architecture, model: nn.Module, tokens: int) -> Memory:
    """What a run will hold.

    Args:
        plan: what will be done.
        architecture: the model's parts.
        model: its skeleton.
        tokens: of the calibration data; 0 if no layer needs any.
    """
    sizes: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        sizes[architecture.place_of(name)] += parameter.numel() * parameter.element_size()
    outside, block = sizes.pop(OUTSIDE, 0), max(sizes.values())
    shifted = bool(tokens) and any(Statistic.SHIFT in layer.needs for layer in plan.values())
    twins = 2 if shifted else 1
    packed = max(_stored_by_block(plan).values(), default=0)  # waits until the block is written
    widest, narrowest = (pick(layer.shape[1] for layer in plan.values()) for pick in (max, min))
    element = next(model.parameters()).element_size()
    together = _solved_together(plan)
    if tokens:
        needs = (_to_solve(layers) for layers in together)
        statistics, solving, movable = max(needs, key=lambda parts: sum(parts[:2]))
    else:
        statistics = movable = 0
        solving = packed + max(map(_to_round, plan.values()))  # one block waits, another is written meanwhile
    return Memory(
        libraries=psutil.Process().memory_info().rss,
        weights=max(outside, twins * block + packed),
        states=twins * tokens * (widest + narrowest) * element,  # the residual stream, and the widest input
        statistics=statistics,
        solving=solving,
        movable=movable,
    )


def _to_solve(layers: list[PlannedLayer]) -> tuple[int, int, int]:
    """Bytes of statistics (with a factor), of weights and what is made of them, and how many of the first can wait."""
    width, rows = layers[0].shape[1], sum(layer.shape[0] for layer in layers)
    shifted = any(Statistic.SHIFT in layer.needs for layer in layers)
    matrix = _FLOAT * width**2 if any(_has_moment(layer) for layer in layers) else 0
    matrices, movable = (5, 3) if shifted else (2, 1)  # the moment and its factor; a solve's own copy, and two shifts
    weights = rows * width * (_FLOAT * (2 if shifted else 1) + 1)  # as they are, their target; codes
    return matrices * matrix, weights + _FLOAT * _COPIES * min(rows * width, _CHUNK), movable * matrix


def _to_round(layer: PlannedLayer) -> int:
    """Bytes of what is made of a layer that is solved by itself: codes, and a copy where one is made."""
    return layer.shape[0] * layer.shape[1] * (1 if layer.as_stored else _FLOAT * 3 // 2)


def _solved_together(plan: Plan) -> list[list[PlannedLayer]]:
    """Layers that share their input, mostly: those of one module and width."""
    together: dict[tuple[str, int], list[PlannedLayer]] = {}
    for layer in plan.values():
        together.setdefault((layer.name.rpartition(".")[0], layer.shape[1]), []).append(layer)
    return list(together.values())


def result_size(plan: Plan, model: nn.Module) -> int:
    """Bytes on disk of the result, about: what quantized layers store, and what stays as it is."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    for name, layer in plan.items():
        now = layer.shape[0] * layer.shape[1] * get_weight(model.get_submodule(name)).element_size()
        size += stored_bytes(planned_storage(layer)) - now
    return size


def estimate(
    plan: Plan,
    source: ModelSource,
    model: nn.Module,
    architecture: Architecture,
    tokens: int,
    needs: Needs,
    calibration: dict[str, Any],
) -> Estimate:
    """What the run would take; loads and solves one layer to know.

    Args:
        plan: what would be done.
        source: where weights come from, and on which device they are.
        model: its skeleton, which is left empty.
        architecture: its parts.
        tokens: of the calibration data.
        needs: what it would hold, within its budget if it has one.
        calibration: how the data came about.
    """
    full = memory_needs(plan, architecture, model, tokens)
    seconds, timed = _seconds(plan, source, model, tokens)
    stored = sum(stored_bytes(planned_storage(layer)) for layer in plan.values())
    weights = sum(layer.shape[0] * layer.shape[1] for layer in plan.values())
    return Estimate(
        layers=dict(Counter(_in_words(layer) for layer in plan.values())),
        blocks=len(architecture.blocks),
        memory=needs.memory,
        on_device=needs.device,
        disk=result_size(plan, model),
        spilled=max(0, full.states - needs.states) + needs.memory.waiting,
        seconds=seconds,
        timed=timed,
        calibration=calibration,
        bits=8 * stored / weights,
        device=str(source.device),
    )


def _in_words(layer: PlannedLayer) -> str:
    scheme = layer.scheme
    compensation = "" if scheme.compensation == "none" else f" + {scheme.compensation}"
    activations = "" if scheme.activations == "none" else f", activations {scheme.activations}"
    scales = f"{scheme.granularity} a scale in {scheme.scale_dtype}"
    return f"{scheme.format}, {scales}, {scheme.quantizer}{compensation}{activations}"


def _stored_by_block(plan: Plan) -> Counter[str]:
    stored: Counter[str] = Counter()
    for layer in plan.values():
        stored[layer.block] += stored_bytes(planned_storage(layer))
    return stored


@torch.no_grad()
def _seconds(plan: Plan, source: ModelSource, model: nn.Module, tokens: int) -> tuple[float, str]:
    """Seconds for all layers, from one that is loaded, run, observed and solved; and which it was.

    Loading and running count by the weight, the second moment by the square of the width, and what a method with a
    second moment does by both.
    """
    usual = Counter((layer.shape, _in_words(layer)) for layer in plan.values())
    # Of the kinds that are there most often, the smallest is the quickest to time.
    most = max(usual.values())
    common = [layer for layer in plan.values() if usual[layer.shape, _in_words(layer)] == most]
    layer = min(common, key=lambda layer: math.prod(layer.shape))
    module = model.get_submodule(layer.name)

    started = time.perf_counter()
    source.load(model, layer.name)
    loading = time.perf_counter() - started
    weight = get_weight(module)
    running = observing = 0.0
    statistics = None
    if tokens:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_TIMED_TOKENS, layer.shape[1], generator=generator).to(weight)
        accumulator = InputAccumulator(layer.needs, layer.shape[1], weight.device)
        accumulator.add(x)  # once to warm up
        _wait(x)
        started = time.perf_counter()
        accumulator.add(x)
        _wait(x)
        observing = (time.perf_counter() - started) / _TIMED_TOKENS
        started = time.perf_counter()
        _wait(x @ weight.T)
        running = (time.perf_counter() - started) / _TIMED_TOKENS
        if Statistic.SHIFT in layer.needs:
            accumulator.compare(x, x + 0.01 * x.roll(1), held_out=False)
            accumulator.compare(x, x + 0.01 * x.roll(1), held_out=True)
            observing, running = 3 * observing, 2 * running  # the twin's, and products that are not symmetric
        statistics = accumulator.finish()
    started = time.perf_counter()
    solve([layer], {layer.name: weight}, statistics)
    solving = time.perf_counter() - started
    source.unload(model, layer.name)

    def times(layers: Iterable[PlannedLayer], work: Callable[[PlannedLayer], float]) -> float:
        return sum(map(work, layers)) / work(layer)

    inputs = [layers[-1] for layers in _solved_together(plan)]
    total = (loading + running * tokens) * times(plan.values(), lambda other: math.prod(other.shape))
    total += observing * tokens * times(inputs, lambda other: other.shape[1] ** (2 if _has_moment(other) else 1))
    total += solving * times(
        plan.values(), lambda other: math.prod(other.shape) * (other.shape[1] if _has_moment(other) else 1)
    )
    return total, layer.name


def _wait(x: torch.Tensor) -> None:
    """Until a device has done what it was asked for: it hands out a number when all before is done."""
    x[0, 0].item()


def _has_moment(layer: PlannedLayer) -> bool:
    return Statistic.SECOND_MOMENT in layer.needs
