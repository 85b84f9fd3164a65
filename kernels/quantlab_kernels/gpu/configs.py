"""How the work is cut up: as data, one table for each class of devices; a static choice among them; and what was tuned.

The choice needs no measurement: it follows from the rows of activations and the number of multiprocessors. Where a user
has tuned (:func:`quantlab_kernels.gpu.tune.tune`), the fastest of the same table is read from a JSON file.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING
from pathlib import Path

from quantlab_kernels.gpu.layout import Layout, lane_width


@dataclass(frozen=True)
class GemvConfig:
    """A tile of the GEMV; its program is one warp.

    Attributes:
        block_rows: rows of weights of a program.
        block_lanes: lanes of a step: four for each thread of the warp, so that a step is one 128-bit load for each row
            and plane, and activations come where they are needed.
    """

    block_rows: int
    block_lanes: int


@dataclass(frozen=True)
class GemmConfig:
    """A tile of the GEMM.

    Attributes:
        block_m: rows of activations.
        block_n: rows of weights.
        block_lanes: lanes of a step.
        warps: of a program.
        stages: of the software pipeline.
    """

    block_m: int
    block_n: int
    block_lanes: int
    warps: int
    stages: int


Config = GemvConfig | GemmConfig


@dataclass(frozen=True)
class Device:
    """What the choice of a config depends on.

    Attributes:
        architecture: ``sm_90`` or ``gfx942``.
        multiprocessors: how many there are.
    """

    architecture: str
    multiprocessors: int


# The most rows of activations that a GEMV is used for: from here on its multiplications, one for each weight and row,
# are more than a tensor core's whole work.
MOST_GEMV_ROWS = 2
# Bytes in flight hide the memory's latency when about so many warps are at work on a multiprocessor.
_WARPS = 16


def architecture_class(architecture: str) -> str:
    """The table that a device uses: the newest that is not newer than it, of its maker."""
    if architecture.startswith("gfx"):
        return "gfx942"
    number = int(architecture[3:])
    older = [name for name in GEMV if name.startswith("sm_") and int(name[3:]) <= number]
    return max(older, key=lambda name: int(name[3:]), default="sm_80")
def choose(*a): raise NotImplementedError
