"""How the work is cut up: as data, one table for each class of devices; a static choice among them; and what was tuned.

The choice needs no measurement: it follows from the rows of activations and the number of multiprocessors. Where a user
has tuned (:mod:`quantlab_kernels.gpu.tune`), the fastest of the same table is read from a JSON file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from quantlab_kernels.gpu.formats import TABLE16, Format
from quantlab_kernels.gpu.layout import Layout, lane_width


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
class PanelConfig:
    """A tile of the kernel that decodes a panel: rows and lanes of weights, warps."""

    block_rows: int
    block_lanes: int
    warps: int


@dataclass(frozen=True)
class W8A8Config:
    """A tile of the 8-bit GEMM: rows of activations and of weights, inputs of a step, warps, pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


Config = GemvConfig | GemmConfig | PanelConfig


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
        gemv: for one row, by the most bits of a code, ascending; of a long weight, see :func:`gemv_config`.
        gemm: by the most rows of activations that they are for, ascending; 0 is any number.
        w8a8: likewise.
        looked_up: likewise, in place of ``gemm`` for tables in registers.
        panel: for more rows than the others are for.
    """

    gemv: dict[int, GemvConfig]
    gemm: dict[int, GemmConfig]
    w8a8: dict[int, W8A8Config]
    looked_up: dict[int, GemmConfig] | None = None
    panel: PanelConfig = PanelConfig(8, 32, 4)


_GEMV = {2: GemvConfig(8, 128), 3: GemvConfig(4, 128), 4: GemvConfig(8, 128), 7: GemvConfig(4, 128),
         8: GemvConfig(8, 128)}  # fmt: skip
# Measured on an H100: 128 registers a thread let sixteen warps of a multiprocessor wait for memory at a time.
_GEMV_90 = {2: GemvConfig(4, 128, 128), 3: GemvConfig(4, 128, 168), 4: GemvConfig(8, 128, 128),
            7: GemvConfig(4, 128, 168), 8: GemvConfig(4, 128)}  # fmt: skip
_GEMM = {16: GemmConfig(16, 64, 128, 2, 3), 32: GemmConfig(32, 64, 128, 2, 3), 64: GemmConfig(64, 64, 128, 4, 3)}
_WIDE = GemmConfig(64, 128, 128, 4, 3)
_W8A8 = {16: W8A8Config(16, 128, 128, 4, 4), 64: W8A8Config(64, 128, 128, 4, 3), 0: W8A8Config(128, 128, 128, 8, 3)}
# A table takes nine registers of every thread, and its look-up a few more: smaller tiles, or they spill.
_LOOKED_UP = {16: GemmConfig(16, 32, 128, 2, 3), 32: GemmConfig(32, 32, 128, 2, 3), 0: GemmConfig(32, 128, 128, 4, 3)}
_WARP_TENSOR_CORES = Table(_GEMV, _GEMM | {0: _WIDE}, _W8A8, _LOOKED_UP)
# Tensor cores that take a whole tile (wgmma, tcgen05) keep the sums out of the way: a tile twice as wide fits.
_TILE_TENSOR_CORES = Table(_GEMV_90, _GEMM | {0: GemmConfig(128, 128, 128, 4, 3)}, _W8A8, _LOOKED_UP)
_ALL_REGISTERS = {2: GemvConfig(8, 128, 255), 3: GemvConfig(4, 128, 255), 4: GemvConfig(8, 128, 255),
                  7: GemvConfig(4, 128, 255), 8: GemvConfig(8, 128, 255)}  # fmt: skip

TABLES = {
    # Where codes of 8 bits would spill in the tile of the others.
    "sm_80": replace(_WARP_TENSOR_CORES, gemm=_WARP_TENSOR_CORES.gemm | {16: GemmConfig(16, 32, 128, 1, 3)}),
    "sm_89": _WARP_TENSOR_CORES,
    "sm_90": _TILE_TENSOR_CORES,
    "sm_100": replace(_TILE_TENSOR_CORES, gemv=_ALL_REGISTERS),
    "sm_120": _WARP_TENSOR_CORES,
    "gfx942": Table(
        {
            2: GemvConfig(4, 256),
            3: GemvConfig(2, 256),
            4: GemvConfig(4, 256),
            7: GemvConfig(2, 256),
            8: GemvConfig(4, 256),
        },
        {16: GemmConfig(16, 32, 128, 1, 2), 0: GemmConfig(64, 128, 128, 4, 2)},
        {64: W8A8Config(64, 128, 128, 4, 2), 0: W8A8Config(128, 128, 128, 8, 2)},
    ),
    # Few programs, each as large as it gets: every one costs the interpreter the same.
    "interpreter": Table(
        {
            2: GemvConfig(32, 128),
            3: GemvConfig(32, 32),
            4: GemvConfig(32, 128),
            7: GemvConfig(32, 32),
            8: GemvConfig(32, 128),
        },
        {16: GemmConfig(16, 64, 128, 1, 1), 0: GemmConfig(128, 64, 128, 1, 1)},
        {0: W8A8Config(64, 64, 128, 1, 1)},
    ),
}

# From two rows on a GEMV's multiplications, one for each weight and row, are more than all that a tensor core costs.
_GEMV_ROWS = 1
# So many warps of a GEMV on a multiprocessor keep the memory busy; programs of a GEMM, which are several.
_GEMV_WARPS = 7
_GEMM_PROGRAMS = 3
# From here on a product is bound by arithmetic, and the library's GEMM over decoded weights wins.
_PANEL_ROWS = 64
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


def gemv_config(device: Device, format: Format, out_features: int) -> GemvConfig:
    """The tile of a GEMV: as in the table, with fewer rows where that would leave multiprocessors with little to do."""
    config = next(one for most, one in table_for(device.architecture).gemv.items() if format.bits <= most)
    rows = config.block_rows
    if format.decode == TABLE16:  # nine of the registers hold the table
        rows, config = max(rows // 2, 1), replace(config, registers=config.registers and max(config.registers, 168))
    while rows > 1 and out_features < rows * device.multiprocessors * _GEMV_WARPS:
        rows //= 2
    return replace(config, block_rows=rows)


def gemm_configs(architecture: str, format: Format) -> dict[int, GemmConfig]:
    """The tiles of a GEMM, as :class:`Table` has them."""
    table = table_for(architecture)
    return table.gemm if format.decode != TABLE16 or table.looked_up is None else table.looked_up


def gemm_config(architecture: str, format: Format, rows: int) -> GemmConfig:
    """The tile of a GEMM for so many rows of activations."""
    return next(config for most, config in gemm_configs(architecture, format).items() if rows <= most or most == 0)


def candidates(device: Device, format: Format, out_features: int, rows: int) -> tuple[Config, ...]:
    """The configs of a device for so many rows of activations, the default first and what tuning may prefer to it."""
    tiles, panel = gemm_configs(device.architecture, format), table_for(device.architecture).panel
    gemm = gemm_config(device.architecture, format, rows)
    if rows <= _GEMV_ROWS:
        gemv = gemv_config(device, format, out_features)
        other = replace(gemv, block_rows=gemv.block_rows // 2 if gemv.block_rows > 1 else 2)
        return gemv, other, gemm
    if rows <= _PANEL_ROWS:
        fitting = [config for most, config in tiles.items() if rows <= most or most == 0]
        return (*fitting[:2], panel)
    return panel, gemm


def choose(device: Device, format: Format, layout: Layout, out_features: int, rows: int) -> tuple[Config, int]:
    """The config and the number of shares of the inputs for a product, without measuring anything."""
    config = candidates(device, format, out_features, rows)[0]
    return config, shares(device, config, layout, out_features, rows)


def shares(device: Device, config: Config, layout: Layout, out_features: int, rows: int) -> int:
    """Into how many shares the inputs are cut so that all multiprocessors have work.

    A GEMV's are cut where there are not two warps for each, since a second kernel has to add the shares. A GEMM's are a
    power of two; not more than there are steps, nor so many that the partial sums are more than the weights.
    """
    if isinstance(config, PanelConfig):
        return 1
    if isinstance(config, GemvConfig):
        wanted, lanes = 2 * device.multiprocessors * config.block_rows // out_features, config.block_lanes
        return max(1, min(wanted, -(-layout.lanes // lanes)))
    blocks, lanes = -(-out_features // config.block_n) * -(-rows // config.block_m), config.lanes(layout.bits)
    wanted = 1 << (-(-device.multiprocessors * _GEMM_PROGRAMS // blocks) - 1).bit_length()
    return max(1, min(wanted, -(-layout.lanes // lanes), int(layout.columns * layout.bits / 8 / (8 * rows))))


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
