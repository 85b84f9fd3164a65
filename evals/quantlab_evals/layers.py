"""Seconds of single layers, with weights that come from memory and not from a cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .machine import wait_for
from .timing import Timing, timed

_FLUSH_BYTES = 96 << 20  # read before the calls of a round: more than most processors' last cache holds
_FLUSH_BYTES_ELSEWHERE = 512 << 20
_CALLS = 8  # timed in a round: how many layers of a kind, at most

Layers = Mapping[str, tuple[Sequence[nn.Module], Tensor]]
"""By name: layers that are alike, and what they are called with."""


@torch.inference_mode()
def layer_timings(
    layers: Layers, *, rounds: int = 10, progress: Callable[[int, int], None] | None = None
) -> dict[str, Timing]:
    """Call layers as a model calls them while it decodes, in turns, and take the time of each call.

    In each round, and for each name, other memory is read until no weight is left in a cache; then the layers of that
    name are called one after the other. The first call is not counted where there are more: it brings the code back.
    A call of another device than the CPU only asks for the work: there the time of all of a turn, to the end of the
    last, is divided by their number, so that it is the device's where it has work, and that of asking where it waits.

    Args:
        layers: see above.
        rounds: of which each gives the median of its calls; one more comes first and is not counted.
        progress: told after each round.

    Returns:
        by name, the seconds of a call.
    """
    devices = {x.device for _, x in layers.values()}
    flush = {device: torch.ones(_flush_bytes(device) // 4, device=device) for device in devices}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    for index in range(rounds + 1):
        for name, (alike, x) in layers.items():
            flush[x.device].sum()
            first = index * _CALLS
            turn = [alike[(first + place) % len(alike)] for place in range(min(_CALLS + 1, len(alike)))]
            counted = _one_by_one(turn, x) if x.device.type == "cpu" else [_in_a_row(turn, x)]
            if index:
                wall, cpu = (statistics.median(of) for of in zip(*counted, strict=True))
                seconds[name].append((wall, cpu))
        if progress is not None:
            progress(index, rounds)
    return {name: Timing.of(found) for name, found in seconds.items()}


def _flush_bytes(device: torch.device) -> int:
    return _FLUSH_BYTES if device.type == "cpu" else _FLUSH_BYTES_ELSEWHERE


def _one_by_one(turn: Sequence[nn.Module], x: Tensor) -> list[tuple[float, float]]:
    """Seconds of each call, of the clock and of the processor."""
    took = [timed(partial(layer, x))[1] for layer in turn]
    return took[1:] or took


def _in_a_row(turn: Sequence[nn.Module], x: Tensor) -> tuple[float, float]:
    """Mean seconds of a call on a device that works while the next call is made."""

    def call(layers: Sequence[nn.Module]) -> None:
        for layer in layers:
            layer(x)
        wait_for(x.device)

    first, *rest = turn
    call([first] if rest else [])
    counted = rest or [first]
    wall, cpu = timed(partial(call, counted))[1]
    return wall / len(counted), cpu / len(counted)
