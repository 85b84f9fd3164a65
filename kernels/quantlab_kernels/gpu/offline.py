"""Kernels compiled for a device that is not there, and what the machine code says of registers, spills and loads.

Triton's wheel brings the assemblers and disassemblers, so this needs neither a driver nor a CUDA toolkit.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Bytes of shared memory that one block may have: CUDA C++ programming guide, compute capabilities; AMD CDNA3 ISA.
SHARED_LIMIT = {
    "sm_80": 166_912,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
ARCHITECTURES = tuple(SHARED_LIMIT)

_INSTRUCTION = re.compile(r"\t(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)")
_LABEL = re.compile(r"^(LBB\w+):")
_BRANCH = re.compile(r"\bBRA\b.*?(LBB\w+|0x[0-9a-f]+);")
_INSTRUCTION_BYTES = 16
# HFMA2.MMA is ordinary arithmetic in spite of its name.
_TENSOR_CORE = re.compile(r"^(H?G?MMA|[HIQ]MMA|[HIQ]GMMA|UTC\w*MMA)\b")
_AMD_INSTRUCTION = re.compile(r"^\t([a-z]\w+)")
_AMD_LABEL = re.compile(r"^(\.LBB\w+):")
_AMD_BRANCH = re.compile(r"^\ts_c?branch\w*\s+(\.LBB\w+)")


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code in figures.

    Attributes:
        registers: of a thread (vector registers on AMD).
        spilled: bytes of stack or scratch memory that a thread needs; local loads and stores count as one each.
        shared: bytes of shared memory of a block.
        loop: instructions of the longest innermost loop by their full names; of the whole kernel if it has none.
        whole: instructions of the whole kernel.
        flushes: whether any float32 arithmetic replaces subnormal numbers by zero.
    """

    registers: int
    spilled: int
    shared: int
    loop: Counter[str]
    whole: Counter[str]
    flushes: bool

    @property
    def tensor_core(self) -> str:
        """The tensor-core instruction that the kernel uses, without its modifiers; empty if none."""
        kinds = {name.split(".")[0] for name in self.whole if is_tensor_core(name)}
        return "+".join(sorted(kinds))

    @property
    def wide_loads(self) -> int:
        """Loads of 128 bits in the loop, through registers or straight into shared memory."""
        return sum(count for name, count in self.loop.items() if is_wide_load(name))

    @property
    def barriers(self) -> int:
        """Barriers of a block in the loop."""
        return sum(count for name, count in self.loop.items() if re.match(r"(BAR\b|s_barrier)", name))


def is_tensor_core(name: str) -> bool:
    """Whether an instruction runs on tensor cores (matrix cores)."""
    return bool(_TENSOR_CORE.match(name)) or name.startswith(("v_mfma", "v_smfma"))


def is_wide_load(name: str) -> bool:
    """Whether an instruction loads 128 bits from global memory for a thread, or a tile by a descriptor."""
    wide = re.match(r"(LDG|LDGSTS)\b.*\.128", name)
    return bool(wide) or name.startswith(("global_load_dwordx4", "buffer_load_dwordx4", "UTMALDG", "global_load_b128"))


def compile_for(
    kernel: Any,
    architecture: str,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: tuple[str, ...],
    **options: Any,
) -> Compiled:
    """Compile a ``triton.jit`` function and count.

    Args:
        kernel: the function.
        architecture: one of :data:`ARCHITECTURES`.
        types: of the arguments that are not constants: ``*fp16``, ``i32``, ``fp32``.
        constants: the ``tl.constexpr`` arguments.
        aligned: arguments that the launcher guarantees to be multiples of 16.
        options: ``num_warps``, ``num_stages``.
    """
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=dict(constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture[3:]), 32)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})
    return _amd_figures(compiled) if amd else _nvidia_figures(compiled)


def _nvidia_figures(compiled: Any) -> Compiled:
    lines = compiled.asm["sass"].splitlines()
    whole = _count(lines, _INSTRUCTION)
    usage = _resource_usage(compiled.asm["cubin"])
    local = sum(count for name, count in whole.items() if name.split(".")[0] in ("LDL", "STL"))
    return Compiled(
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"] + local,
        shared=compiled.metadata.shared,
        loop=_count(innermost_loop(lines, _LABEL, _BRANCH), _INSTRUCTION),
        whole=whole,
        flushes=bool(re.search(r"\.ftz\.\w*f32", compiled.asm["ptx"])),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def _amd_figures(compiled: Any) -> Compiled:
    text = compiled.asm["amdgcn"]
    lines = text.splitlines()

    def figure(name: str) -> int:
        return int(re.search(rf"{name}:?\s+(\d+)", text)[1])  # type: ignore[index]

    # Scalar registers "spill" into lanes of vector registers, which is no memory; what is, is in the scratch size.
    spilled = figure(r"\.vgpr_spill_count") + figure("ScratchSize")
    return Compiled(
        registers=figure(r"\.vgpr_count"),
        spilled=spilled,
        shared=compiled.metadata.shared,
        loop=_count(innermost_loop(lines, _AMD_LABEL, _AMD_BRANCH), _AMD_INSTRUCTION),
        whole=_count(lines, _AMD_INSTRUCTION),
        # Bit 1 of the mode: subnormal results are kept; 3 is "neither inputs nor results are flushed".
        flushes=figure(r"\.amdhsa_float_denorm_mode_32") != 3,
    )


def innermost_loop(lines: list[str], label: re.Pattern[str], branch: re.Pattern[str]) -> list[str]:
    """The longest stretch from a label to a branch back to it that holds no other such; all if there is none."""
    places: dict[str, int] = {}
    spans = []
    address = 0
    for at, line in enumerate(lines):
        if found := label.match(line):
            places[found[1]] = at
        elif _INSTRUCTION.search(line):  # NVIDIA's disassembler names places by labels or, from sm_100 on, by addresses
            places[hex(address)] = at
            address += _INSTRUCTION_BYTES
        if (found := branch.search(line)) and found[1] in places:
            spans.append((places[found[1]], at + 1))
    # The endless loop after a kernel's end, one branch to itself, is padding.
    spans = [(first, last) for first, last in spans if last - first > 2]
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    first, last = max(inner, key=lambda span: span[1] - span[0], default=(0, len(lines)))
    return lines[first:last]


def _count(lines: list[str], pattern: re.Pattern[str]) -> Counter[str]:
    return Counter(found[1] for line in lines if (found := pattern.search(line)))
