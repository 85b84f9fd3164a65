"""How the work is cut up: as data, one table for each class of devices; a static choice among them; and what was tuned.

The choice needs no measurement: it follows from the rows of activations and the number of multiprocessors. Where a user
has tuned (:mod:`quantlab_kernels.gpu.tune`), the fastest of the same table is read from a JSON file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from quantlab_kernels.gpu.formats import TABLE16, Format
from quantlab_kernels.gpu.layout import Layout, lane_width, lane_words


@dataclass(frozen=True)
class GemvConfig:
    """A tile of the GEMV; its program is one warp.

    Attributes:
        block_rows: rows of weights of a program.
        block_lanes: lanes of a step: four for each thread of the warp, so that a step is one 128-bit load for each row
            and plane, and activations come where they are needed.
        registers: that a thread may have. 0 leaves it to the compiler, which for sm_100 would rather spill than take
            more than 168, though for a program of one warp nothing is gained by fewer.
    """

    block_rows: int
    block_lanes: int
    registers: int = 0

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        return {"num_warps": 1, "num_stages": 1} | ({"maxnreg": self.registers} if self.registers else {})


@dataclass(frozen=True)
class GemmConfig:
    """A tile of the GEMM.

    Attributes:
        block_m: rows of activations.
        block_n: rows of weights.
        inputs: of a step, about; see :meth:`lanes`.
        warps: of a program.
        stages: of the software pipeline.
    """

    block_m: int
    block_n: int
    inputs: int
    warps: int
    stages: int

    def lanes(self, bits: int) -> int:
        """Lanes of a step: at least 8, for tensor cores take 16 inputs at a time; at most 16, for registers."""
        return min(max(8, self.inputs // lane_width(bits)), 16)

    def depth(self, bits: int) -> int:
        """Stages of the software pipeline: one less where lanes are long, and a step holds more inputs than asked."""
        return max(1, self.stages - (self.lanes(bits) * lane_width(bits) > self.inputs))


@dataclass(frozen=True)
class W8A8Config:
    """A tile of the 8-bit GEMM: rows of activations and of weights, inputs of a step, warps, pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
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


@dataclass(frozen=True)
class Table:
    """The configs of a class of devices.

    Attributes:
        gemv: for one row: where a lane has one word, and where it has three or more.
        gemm: by the most rows of activations that they are for, ascending; 0 is any number.
        w8a8: likewise.
        looked_up: likewise, in place of ``gemm`` for tables in registers.
    """

    gemv: tuple[GemvConfig, GemvConfig]
    gemm: dict[int, GemmConfig]
    w8a8: dict[int, W8A8Config]
    looked_up: dict[int, GemmConfig] | None = None


_GEMV = GemvConfig(8, 128), GemvConfig(4, 128)
# One warp with all 32 rows of weights: no exchange between warps, and many programs.
_SKINNY = GemmConfig(16, 32, 128, 1, 3)
_WIDE = GemmConfig(64, 128, 128, 4, 3)
_W8A8 = {16: W8A8Config(16, 128, 128, 4, 4), 64: W8A8Config(64, 128, 128, 4, 3), 0: W8A8Config(128, 128, 128, 8, 3)}
# A table takes nine registers of every thread, and its look-up a few more: smaller tiles, or they spill.
_LOOKED_UP = {16: GemmConfig(16, 16, 128, 1, 3), 0: GemmConfig(32, 128, 128, 4, 3)}
_WARP_TENSOR_CORES = Table(_GEMV, {16: _SKINNY, 0: _WIDE}, _W8A8, _LOOKED_UP)
# Tensor cores that take a whole tile (wgmma, tcgen05) keep the sums out of the way: a tile twice as wide fits.
_TILE_TENSOR_CORES = Table(_GEMV, {16: _SKINNY, 64: _WIDE, 0: GemmConfig(128, 128, 128, 4, 3)}, _W8A8, _LOOKED_UP)
_ALL_REGISTERS = GemvConfig(8, 128, 255), GemvConfig(4, 128, 255)

TABLES = {
    "sm_80": _WARP_TENSOR_CORES,
    "sm_89": _WARP_TENSOR_CORES,
    "sm_90": _TILE_TENSOR_CORES,
    "sm_100": replace(_TILE_TENSOR_CORES, gemv=_ALL_REGISTERS),
    "sm_120": _WARP_TENSOR_CORES,
    "gfx942": Table(
        (GemvConfig(4, 256), GemvConfig(2, 256)),
        {16: GemmConfig(16, 32, 128, 1, 2), 0: GemmConfig(64, 128, 128, 4, 2)},
        {64: W8A8Config(64, 128, 128, 4, 2), 0: W8A8Config(128, 128, 128, 8, 2)},
    ),
    # Few programs, each as large as it gets: every one costs the interpreter the same.
    "interpreter": Table(
        (GemvConfig(32, 128), GemvConfig(32, 32)),
        {16: GemmConfig(16, 64, 128, 1, 1), 0: GemmConfig(128, 64, 128, 1, 1)},
        {0: W8A8Config(64, 64, 128, 1, 1)},
    ),
}

# From two rows on a GEMV's multiplications, one for each weight and row, are more than all that a tensor core costs.
_GEMV_ROWS = 1
# About so many warps at work on a multiprocessor keep the memory busy.
_WARPS = 16


def table_for(architecture: str) -> Table:
    """The configs of a device: those of the newest class of its maker that is not newer than it."""
    if architecture in TABLES:
        return TABLES[architecture]
    if architecture.startswith("gfx"):
        return TABLES["gfx942"]
    older = [name for name in TABLES if name.startswith("sm_") and int(name[3:]) <= int(architecture[3:])]
    return TABLES[max(older, key=lambda name: int(name[3:]), default="sm_80")]


def gemv_config(architecture: str, format: Format) -> GemvConfig:
    """The tile of a GEMV."""
    several = lane_words(format.bits) > 1
    config = table_for(architecture).gemv[several]
    # A table in registers takes nine of them, and several words a lane take the rest.
    return replace(config, block_rows=config.block_rows // 2) if several and format.decode == TABLE16 else config


def gemm_configs(architecture: str, format: Format) -> dict[int, GemmConfig]:
    """The tiles of a GEMM, as :class:`Table` has them."""
    table = table_for(architecture)
    return table.gemm if format.decode != TABLE16 or table.looked_up is None else table.looked_up


def candidates(architecture: str, format: Format, rows: int) -> tuple[Config, ...]:
    """The configs of a device for so many rows of activations, the default first and what tuning may prefer to it."""
    tiles = gemm_configs(architecture, format)
    fitting = [config for most, config in tiles.items() if rows <= most or most == 0][:2]
    return (gemv_config(architecture, format), fitting[0]) if rows <= _GEMV_ROWS else tuple(fitting)


def choose(device: Device, format: Format, layout: Layout, out_features: int, rows: int) -> tuple[Config, int]:
    """The config and the number of shares of the inputs for a product, without measuring anything."""
    config = candidates(device.architecture, format, rows)[0]
    return config, shares(device, config, layout, out_features, rows)


def shares(device: Device, config: Config, layout: Layout, out_features: int, rows: int) -> int:
    """Into how many shares the inputs are cut so that all multiprocessors have work.

    Not more than there are steps, nor so many that writing and reading the partial sums takes more than an eighth of
    the time that reading the weights does.
    """
    if isinstance(config, GemvConfig):
        warps, lanes = -(-out_features // config.block_rows), config.block_lanes
    else:
        blocks = -(-out_features // config.block_n) * -(-rows // config.block_m)
        warps, lanes = blocks * config.warps, config.lanes(layout.bits)
    wanted = -(-device.multiprocessors * _WARPS // warps)
    weight_bytes, partial_bytes = layout.columns * layout.bits / 8, 8 * rows
    return max(1, min(wanted, -(-layout.lanes // lanes), int(weight_bytes / (8 * partial_bytes))))


def choose_w8a8(device: Device, rows: int) -> W8A8Config:
    """The config of an 8-bit product."""
    return next(config for most, config in table_for(device.architecture).w8a8.items() if rows <= most or most == 0)


@cache
def device_of(device: torch.device) -> Device:
    """What is known of a device. Asks the driver, at the first call."""
    if device.type != "cuda":  # only the interpreter gets this far with it
        return Device("interpreter", 4)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Device(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Device(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)
