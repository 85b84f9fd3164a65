"""Seconds of single layers, with weights that come from memory and not from a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .timing import Timing, timed

_FLUSH_BYTES = 96 << 20  # read between two layers: more than any cache of today's processors but the largest holds

Layers = Mapping[str, tuple[Sequence[nn.Module], Tensor]]
"""By name: layers that are alike, and what they are called with."""


@torch.inference_mode()
def layer_timings(
    layers: Layers, *, rounds: int = 10, progress: Callable[[int, int], None] | None = None
) -> dict[str, Timing]:
    """Call layers in turns and take the time of each call.

    Before every call other memory is read, so that the weights are not in a cache; that is how a layer is met while a
    model decodes that is larger than the cache. Each round calls one of the layers of each name, the next one in turn.

    Args:
        layers: see above.
        rounds: calls of each name, after one that is not counted.
        progress: told after each round.

    Returns:
        by name, the seconds of a call.
    """
    flush = torch.ones(_FLUSH_BYTES // 4)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    for index in range(rounds + 1):
        for name, (alike, x) in layers.items():
            layer = alike[index % len(alike)]
            flush.sum()
            _, took = timed(lambda layer=layer, x=x: layer(x))  # type: ignore[misc]
            if index:
                seconds[name].append(took)
        if progress is not None:
            progress(index, rounds)
    return {name: Timing.of(found) for name, found in seconds.items()}
