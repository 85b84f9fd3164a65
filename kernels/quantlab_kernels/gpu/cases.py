"""Every kernel that is shipped, for every device class, as something to compile: kernel, format, dtype, config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any

from quantlab_kernels.gpu.configs import (
    TABLES,
    Config,
    Device,
    GemmConfig,
    GemvConfig,
    PanelConfig,
    W8A8Config,
    gemm_configs,
    gemv_config,
    table_for,
)
from quantlab_kernels.gpu.formats import E2M3, E3M2, INTEGER, TABLE, TABLE16, Format
from quantlab_kernels.gpu.gemm import gemm, gemm_constants
from quantlab_kernels.gpu.gemv import gemv, gemv_constants, reduce
from quantlab_kernels.gpu.layout import lane_width, lane_words
from quantlab_kernels.gpu.offline import Compiled, compile_for, is_tensor_core
from quantlab_kernels.gpu.panels import dequantize, panel_constants
from quantlab_kernels.gpu.plans import REDUCE_ROWS
from quantlab_kernels.gpu.w8a8 import gemm_w8a8, multiplies_e4m3, w8a8_constants
from quantlab_kernels.gpu.weight import Kind

FORMATS = (
    *(Format(bits, INTEGER, -(1 << (bits - 1))) for bits in (2, 3, 4, 8)),
    *(Format(6, E3M2), Format(6, E2M3), Format(4, TABLE16), Format(6, TABLE)),
)
# Made of the same parts in other numbers: compiled for one class of devices.
FURTHER_FORMATS = (*(Format(bits, INTEGER, -(1 << (bits - 1))) for bits in (5, 6, 7)), Format(3, TABLE16))
_FURTHER = "sm_90"
# With the instructions and the tiles of sm_80: bfloat16 of four bits alone.
_LIKE_SM_80 = ("sm_89", "sm_120")
ARCHITECTURES = tuple(name for name in TABLES if name != "interpreter")
GROUP = 128
_COLUMNS = 4096
_OUT_FEATURES = (11008, 4096)
# What the launcher does not promise to be a multiple of 16.
_FREE = {
    *(
        "out_features",
        "rows",
        "groups",
        "blocks",
        "outputs",
        "hidden_outputs",
        "y_stride",
        "first_row",
        "quads",
        "chunk",
        "magic",
    ),
    *("factor", "fold"),
}


@dataclass(frozen=True)
class Peak:
    """A device's limits, as its vendor states them.

    Attributes:
        name: of the device.
        multiprocessors: how many.
        clock: boost clock in Hz.
        lanes: threads that a multiprocessor issues an instruction for in a cycle.
        bandwidth: of memory, bytes a second.
    """

    name: str
    multiprocessors: int
    clock: float
    lanes: int
    bandwidth: float

    def budget(self, bytes_per_weight: float) -> float:
        """Instructions that can be issued for a weight in the time that memory takes to bring it."""
        return self.multiprocessors * self.clock * self.lanes / (self.bandwidth / bytes_per_weight)


# Sources: NVIDIA A100, H100, Blackwell and Ada architecture whitepapers and product pages; AMD CDNA3 whitepaper.
PEAKS = {
    "sm_80": Peak("A100 80 GB SXM", 108, 1.410e9, 128, 2.039e12),
    "sm_89": Peak("RTX 4090", 128, 2.520e9, 128, 1.008e12),
    "sm_90": Peak("H100 SXM", 132, 1.755e9, 128, 3.350e12),
    "sm_100": Peak("B200", 148, 1.850e9, 128, 8.000e12),
    "sm_120": Peak("RTX 5090", 170, 2.407e9, 128, 1.792e12),
    "gfx942": Peak("MI300X", 304, 2.100e9, 64, 5.300e12),
}


@dataclass(frozen=True)
class Case:
    """One kernel to compile.

    Attributes:
        architecture: of the device.
        kernel: ``gemv``, ``gemm``, ``panel``, ``w8a8`` or ``reduce``.
        format: of the weight; None for kernels that read none.
        dtype: of the activations, as Triton calls it.
        config: the tile; None for ``reduce``.
        variant: what differs from symmetric groups of 128: ``zeros``, ``rows`` (one scale a row), ``rank`` (a low-rank
            term).
    """

    architecture: str
    kernel: str
    format: Format | None
    dtype: str
    config: Config | W8A8Config | None = None
    variant: str = ""

    @property
    def name(self) -> str:
        """Under which its figures are kept."""
        tile = "x".join(str(size) for size in astuple(self.config) if size) if self.config else ""
        parts = (
            self.architecture,
            self.kernel,
            self.format.name if self.format else "",
            self.dtype,
            tile,
            self.variant,
        )
        return "/".join(part for part in parts if part)

    @cached_property
    def _kind(self) -> Kind:
        assert self.format is not None
        groups = 1 if self.variant == "rows" else _COLUMNS // GROUP
        return Kind.of(self.format, _COLUMNS, groups, self.variant == "zeros")

    @property
    def _asm(self) -> bool:
        return self.architecture.startswith("sm_")

    @property
    def weights(self) -> int:
        """Weights that a thread handles in a step of the loop; 0 where that is no measure."""
        warp = 32 if self._asm else 64
        if isinstance(self.config, GemvConfig) and self.format:
            return self.config.block_rows * self.config.block_lanes * lane_width(self.format.bits) // warp
        if isinstance(self.config, GemmConfig) and self.format:
            lanes = self.config.lanes(self.format.bits)
            return self.config.block_n * lanes * lane_width(self.format.bits) // (warp * self.config.warps)
        return 0

    @property
    def weight_loads(self) -> int:
        """128-bit loads of codes that a thread makes in a step."""
        assert self.format is not None
        return self.weights * lane_words(self.format.bits) // lane_width(self.format.bits) // 4

    @property
    def budget(self) -> float | None:
        """Issue slots a weight, codes and 16-bit scales counted; None where memory is not what bounds the kernel."""
        tile = self.config
        few_rows = isinstance(tile, GemvConfig) or (isinstance(tile, GemmConfig) and tile.block_m <= 16)
        if not few_rows or self.format is None:
            return None
        return PEAKS[self.architecture].budget(self.format.bits / 8 + 2 / GROUP)

    @property
    def tensor_core(self) -> str:
        """The tensor-core instruction that the kernel must use; empty for those that use none."""
        if self.kernel not in ("gemm", "w8a8"):
            return ""
        assert isinstance(self.config, GemmConfig | W8A8Config)
        if self.architecture == "gfx942":
            return "v_mfma"
        whole_tile = self.config.warps >= 4  # wgmma and tcgen05 need four warps and 64 rows of weights
        kind = {"int8": "I", "fp8e4nv": "Q"}.get(self.dtype, "H")
        if self.architecture == "sm_90" and whole_tile:
            return kind + "GMMA"
        return f"UTC{kind}MMA" if self.architecture == "sm_100" and whole_tile else kind + "MMA"

    def compile(self) -> Compiled:
        """Compile it."""
        kernel, types, constants, options = getattr(self, f"_{self.kernel}")()
        aligned = tuple(name for name in types if name not in _FREE)
        return compile_for(kernel, self.architecture, types, constants, aligned, **options)

    def _gemv(self) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
        assert self.format is not None
        assert isinstance(self.config, GemvConfig)
        rank = 16 if self.variant == "rank" else 0
        constants = gemv_constants(self._kind, self.dtype == "fp16", rank, 1, self.config, True, self._asm)
        return gemv, self._types(gemv, constants), constants, self.config.options

    def _gemm(self) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
        assert self.format is not None
        assert isinstance(self.config, GemmConfig)
        constants = gemm_constants(self._kind, self.config, True, False, self._asm)
        options = {"num_warps": self.config.warps, "num_stages": self.config.depth(self.format.bits)}
        return gemm, self._types(gemm, constants), constants, options

    def _panel(self) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
        assert isinstance(self.config, PanelConfig)
        constants = panel_constants(self._kind, self.config, self._asm)
        types = self._types(dequantize, constants) | {"panel_ptr": f"*{self.dtype}"}
        return dequantize, types, constants, {"num_warps": self.config.warps}

    def _w8a8(self) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
        assert isinstance(self.config, W8A8Config)
        constants = w8a8_constants(self.config, self.dtype == "int8", True, False)
        eight = "*i8" if self.dtype == "int8" else f"*{self.dtype}"
        types = self._types(gemm_w8a8, constants) | {
            "x_ptr": eight,
            "w_ptr": eight,
            "bias_ptr": "*bf16",
            "y_ptr": "*bf16",
        }
        return gemm_w8a8, types, constants, {"num_warps": self.config.warps, "num_stages": self.config.stages}

    def _reduce(self) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
        rank = 16 if self.variant == "rank" else 0
        constants = {"SPLITS": 4, "HIDDEN_SPLITS": 4, "BIAS": False, "RANK": rank, "RANK_BLOCK": 16, "BN": REDUCE_ROWS}
        return reduce, self._types(reduce, constants), constants, {"num_warps": 4}

    def _types(self, kernel: Any, constants: dict[str, Any]) -> dict[str, str]:
        half = f"*{self.dtype}"
        registers = self.format is not None and self.format.decode == TABLE16 and self._asm
        known = {
            **dict.fromkeys(("x_ptr", "right_ptr", "left_ptr", "scales_ptr", "zeros_ptr", "bias_ptr", "y_ptr"), half),
            **dict.fromkeys(("partial_ptr", "hidden_ptr", "powers_ptr", "x_scales_ptr", "w_scales_ptr"), "*fp32"),
            **{"words_ptr": "*i32", "table_ptr": "*i32" if registers else "*fp32", "factor": "fp32", "fold": "fp32"},
        }
        return {name: known.get(name, "i32") for name in kernel.arg_names if name not in constants}


def cases(architecture: str) -> Iterator[Case]:
    """What is compiled for a class of devices: every kernel and format that is shipped, with every tile."""
    device = Device(architecture, PEAKS[architecture].multiprocessors)
    for format in (*FORMATS, *(FURTHER_FORMATS if architecture == _FURTHER else ())):
        four = format == Format(4, INTEGER, -8)
        half_only = format in FURTHER_FORMATS or (architecture in _LIKE_SM_80 and not four)
        for dtype in ("fp16",) if half_only else ("fp16", "bf16"):
            for config in sorted({gemv_config(device, format, outs) for outs in _OUT_FEATURES}, key=astuple):
                yield Case(architecture, "gemv", format, dtype, config)
            for rows, tile in gemm_configs(architecture, format).items():
                # The larger tiles decode as the smallest does: one of the dtypes, and both of four bits.
                further = dtype == "fp16" and format in FORMATS and (rows == 0 or architecture == _FURTHER)
                if rows == 16 or four or further:
                    yield Case(architecture, "gemm", format, dtype, tile)
            if four or (dtype == "fp16" and architecture == _FURTHER):
                yield Case(architecture, "panel", format, dtype, table_for(architecture).panel)
    for dtype in ("fp16", "bf16"):
        format = Format(4, INTEGER, 0)
        yield Case(architecture, "gemv", format, dtype, _four_bits(device), "zeros")
        yield Case(architecture, "gemm", format, dtype, gemm_configs(architecture, format)[16], "zeros")
    format = Format(4, INTEGER, -8)
    yield Case(architecture, "gemv", format, "bf16", _four_bits(device), "rows")
    yield Case(architecture, "gemm", format, "bf16", gemm_configs(architecture, format)[16], "rows")
    yield Case(architecture, "gemv", format, "bf16", _four_bits(device), "rank")
    yield Case(architecture, "reduce", None, "bf16")
    yield Case(architecture, "reduce", None, "bf16", None, "rank")
    for eight in TABLES[architecture].w8a8.values():
        yield Case(architecture, "w8a8", None, "int8", eight)
        if multiplies_e4m3(architecture):
            yield Case(architecture, "w8a8", None, "fp8e4nv", eight)


def _four_bits(device: Device) -> GemvConfig:
    return gemv_config(device, Format(4, INTEGER, -8), _OUT_FEATURES[0])


def issued(architecture: str, compiled: Compiled) -> int:
    """Instructions of a step that compete for issue slots: on AMD, those of the vector units."""
    if not architecture.startswith("gfx"):
        return compiled.loop.total()
    return sum(count for name, count in compiled.loop.items() if name[0] == "v" and not is_tensor_core(name))
