"""Seconds of single layers, with weights that come from memory and not from a cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .timing import Timing, timed

_FLUSH_BYTES = 96 << 20  # read before the calls of a round: more than most processors' last cache holds
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

    Args:
        layers: see above.
        rounds: of which each gives the median of its calls; one more comes first and is not counted.
        progress: told after each round.

    Returns:
        by name, the seconds of a call.
    """
    flush = torch.ones(_FLUSH_BYTES // 4)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    for index in range(rounds + 1):
        for name, (alike, x) in layers.items():
            flush.sum()
            first = index * _CALLS
            turn = [alike[(first + place) % len(alike)] for place in range(min(_CALLS + 1, len(alike)))]
            took = [timed(partial(layer, x))[1] for layer in turn]
            counted = took[1:] or took
            if index:
                wall, cpu = (statistics.median(of) for of in zip(*counted, strict=True))
                seconds[name].append((wall, cpu))
        if progress is not None:
            progress(index, rounds)
    return {name: Timing.of(found) for name, found in seconds.items()}
