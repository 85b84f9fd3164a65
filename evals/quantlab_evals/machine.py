"""What figures of speed were taken on, and how fast its memory is read."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import transformers

_STREAM_BYTES = 256 << 20  # much more than a cache holds
_SUMS_IN_A_ROW = 20


@dataclass(frozen=True)
class Machine:
    """A machine, and what ran on it.

    Attributes:
        cpu: the processor's name.
        instructions: the widest vector instructions that torch uses.
        cores: logical processors.
        threads: that torch uses in an operator.
        memory: bytes.
        system: kernel and architecture.
        python: its version; ``torch`` and ``transformers`` likewise.
        device: that models run on.
    """

    cpu: str
    instructions: str
    cores: int
    threads: int
    memory: int
    system: str
    python: str
    torch: str
    transformers: str
    device: str = "cpu"


def describe_machine(device: torch.device | str = "cpu") -> Machine:
    """This machine, as it is now, and the device that models run on."""
    return Machine(
        cpu=_processor(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        device=device_name(device),
    )


def device_name(place: torch.device | str | int) -> str:
    """What a place of accelerate's device maps is: ``cpu``, ``disk``; a GPU by its kind, ``cuda (NVIDIA H100)``."""
    if place == "disk":
        return "disk"
    device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def stream_bandwidth(rounds: int = 5, device: torch.device | str = "cpu") -> float:
    """Bytes a second at which memory is read: the best of some sums of 256 MiB.

    On a CPU with the threads that torch uses; on another device of some sums in a row, or it would be the time that it
    takes to ask for one.
    """
    buffer, device = torch.ones(_STREAM_BYTES // 4, device=device), torch.device(device)
    sums = 1 if device.type == "cpu" else _SUMS_IN_A_ROW

    def read() -> None:
        for _ in range(sums):
            buffer.sum()
        wait_for(device)

    read()
    return sums * _STREAM_BYTES / min(_seconds(read) for _ in range(rounds))


def wait_for(device: torch.device) -> None:
    """Until a device has done what it was asked for: it hands out a number when all before is done."""
    if device.type != "cpu":
        torch.zeros((), device=device).item()


def matrix_flops(rounds: int = 5, size: int = 1024) -> float:
    """Operations a second of a product of bfloat16 matrices, with the threads that torch uses: the best of some."""
    left, right = (torch.ones(size, size, dtype=torch.bfloat16) for _ in range(2))
    torch.nn.functional.linear(left, right)
    best = min(_seconds(lambda: torch.nn.functional.linear(left, right)) for _ in range(rounds))
    return 2 * size**3 / best


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
