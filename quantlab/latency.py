"""Seconds of a decoded token, layer by layer, candidate by candidate: measured on this machine, or a roofline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from quantlab_evals import SpeedSettings, Timing, layer_timings, measure_speed
from quantlab_evals.machine import device_name
from torch import nn

from quantlab.allocation.task import Task
from quantlab.devices import Device, device_called
from quantlab.engine.footprint import planned_storage
from quantlab.model_shape import routed_share
from quantlab.nn import QuantLinear
from quantlab.storage import Storage

HERE = "here"
"""The device that is measured, kernel by kernel: the one that the task is on; ``cpu`` is a roofline."""

# Layers of a kind that are called in turns: the first call of a turn brings the code back and is not counted.
_ALIKE, _ROUNDS = 3, 5
_STEP = SpeedSettings(prompt_tokens=32, new_tokens=16, rounds=5, compiled=False)


@dataclass(frozen=True, eq=False)
class Latency:
    """What a token takes when one context decodes alone.

    Attributes:
        by_layer: seconds of each layer under each candidate; infinite where it cannot be had.
        fixed: of everything that takes no part.
        source: where the figures are from.
    """

    by_layer: Mapping[str, np.ndarray]
    fixed: float
    source: str


def latency(task: Task, device: str) -> Latency:
    """Seconds on a device: ``here``, measured; else a name, see :func:`quantlab.devices.device_called`.

    Raises:
        QuantlabError: no such device; a mixture whose config does not say how many experts a token goes through.
    """
    share = routed_share(task.source.config) if task.architecture.routed else 1.0
    shares = {name: share if name in task.architecture.routed else 1.0 for name in task.names}
    return _measured(task, shares) if device == HERE else _roofline(task, device_called(device), shares)


def _roofline(task: Task, device: Device, shares: Mapping[str, float]) -> Latency:
    """Whichever takes longer: reading a layer's bytes, or its operations."""
    weights = task.weights()
    by_layer = {
        name: shares[name] * np.maximum(sizes / device.bandwidth, 2 * weights[name] / device.flops)
        for name, sizes in task.bytes().items()
    }
    others = [name for name in task.architecture.all_layers if name not in task.names]
    read = sum(task.weight(name).numel() * task.weight(name).element_size() for name in others)
    return Latency(by_layer, read / device.bandwidth, f"roofline of {device.name}: {device.source}")


def _measured(task: Task, shares: Mapping[str, float]) -> Latency:
    """Every kind of layer under every candidate, called alone; and one step of the original, for all that is left."""
    timings = layer_timings(
        _calls(task), rounds=_ROUNDS, progress=lambda done, total: task.tell(done, total, "kernels")
    )
    by_layer = {}
    for name in task.names:
        by_layer[name] = np.full(len(task.candidates), math.inf)
        by_layer[name][task.kept] = shares[name] * _original(task, name, timings).median
        for number, plan in task.plans.items():
            by_layer[name][number] = shares[name] * timings[_key(planned_storage(plan[name]))].median
    step = measure_speed({"original": task.model()}, _STEP).models[0].best(1).step.median
    inside = sum(shares[name] * _original(task, name, timings).median for name in task.names)
    device = task.source.device
    how = f"{torch.get_num_threads()} threads" if device.type == "cpu" else f"on {device_name(device)}"
    return Latency(by_layer, max(0.0, step - inside), f"measured here, {how}, without compiling")


def _calls(task: Task) -> dict[str, tuple[list[nn.Module], torch.Tensor]]:
    """One kind of layer each, and what it is called with: one row, as a token that is decoded."""
    calls: dict[str, tuple[list[nn.Module], torch.Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    for name in task.names:
        rows, columns = next(iter(task.plans.values()))[name].shape if task.plans else task.weight(name).shape
        device = task.source.device
        x = torch.randn(1, columns, generator=generator).to(device, task.source.dtype)
        original = [_linear(rows, columns, task.source.dtype).to(device) for _ in range(_ALIKE)]
        calls.setdefault(f"{rows}x{columns}", (original, x))
        for plan in task.plans.values():
            storage = planned_storage(plan[name])
            calls.setdefault(_key(storage), ([_random(storage, generator).to(device) for _ in range(_ALIKE)], x))
    return calls


def _original(task: Task, name: str, timings: Mapping[str, Timing]) -> Timing:
    shape = next(iter(task.plans.values()))[name].shape if task.plans else tuple(task.weight(name).shape)
    return timings[f"{shape[0]}x{shape[1]}"]


def _key(storage: Storage) -> str:
    return str(sorted(storage.to_dict().items()))


def _linear(rows: int, columns: int, dtype: torch.dtype) -> nn.Module:
    layer = nn.Linear(columns, rows, bias=False, dtype=dtype).requires_grad_(False)
    return layer.eval()


def _random(storage: Storage, generator: torch.Generator) -> nn.Module:
    """A layer stored as a candidate would be, of random numbers: what they are does not change its time."""
    layer = QuantLinear(storage)
    for name, buffer in layer.named_buffers():
        if buffer.dtype == torch.uint8:
            buffer.random_(0, 256 if name == "codes" else 2, generator=generator)
        elif buffer.is_floating_point():
            values = torch.linspace(-1, 1, buffer.numel()) if name == "table" else torch.full((buffer.numel(),), 0.01)
            buffer.copy_(values.view(buffer.shape))
        else:
            buffer.zero_()
    return layer.eval()
