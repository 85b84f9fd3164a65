"""Where a run computes, and where a model goes that is run as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from quantlab.errors import PreflightError, QuantlabError

# Beside the CPU, whose tensors several processes can add up: see :class:`quantlab.engine.distributed.Ranks`.
_SHARED = "cuda"
# Of the free memory: the rest is for what libraries take, and for gaps.
_USABLE = 0.9
AUTO = "auto"

# What to do where a device has no memory left, by what was going on.
_QUANTIZING = (
    "what was done is kept, and the same command goes on with it: end what else is on the device, or start anew with "
    "shorter calibration sequences, with a recipe that needs less (w4-gptq-fast), or with --device cpu"
)
MEASURING = (
    "end what else is on the device, measure on less at once (shorter windows or prompts, smaller batches; of an "
    "original, --cache where there is one), or use --device auto, which places what has no room there in memory and on "
    "disk, or --device cpu"
)


def choose_device(name: str | torch.device, processes: int = 1) -> torch.device:
    """The device that a person asked for.

    Args:
        name: what torch calls it (``cpu``, ``cuda``, ``cuda:1``, ``xpu``), or ``auto``: ``cuda`` if there is one, else
            ``cpu``.
        processes: that share the run. Each takes the GPU that its launcher numbered it for, where ``name`` has no
            number.

    Raises:
        PreflightError: it is not there, has no float64, or cannot be shared by processes.
    """
    if name == AUTO:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cpu":
            return torch.device("cpu")
        if processes > 1 and device.index is None:
            device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.ones((), dtype=torch.float64, device=device).item()  # sums that must not depend on their order
    except Exception as error:  # each kind of device has its own
        reason = " ".join(str(error).split())[:200]
        raise PreflightError(
            f"device {str(name)!r} cannot be used here ({reason}); use cpu or auto, or install a torch that has it; it "
            "must compute in float64"
        ) from error
    if processes > 1 and device.type != _SHARED:
        raise PreflightError(
            f"device {str(name)!r}: {processes} processes can share a run on cpu or {_SHARED}; start one process"
        )
    return device


@dataclass(frozen=True)
class Placement:
    """Where a model goes as a whole.

    Attributes:
        device: where it is called.
        spread: whether accelerate places its parts: on the GPUs, then in memory, then on disk. What is not on a GPU
            comes there when it is called.
    """

    device: torch.device
    spread: bool = False

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments for :func:`quantlab.load`."""
        if self.spread:
            return {"device_map": AUTO, "max_memory": _rooms()}
        return {} if self.device.type == "cpu" else {"device_map": {"": self.device}}

    def refuse_too_large(self, size: int) -> None:
        """Refuse weights of ``size`` bytes, before they are read, that a GPU has no room for.

        Raises:
            PreflightError: says how much there is.
        """
        room = None if self.spread or self.device.type == "cpu" else free_bytes(self.device)
        if room is not None and size > room:
            raise PreflightError(
                f"the weights take {size / 1e9:.2f} GB, and {room / 1e9:.2f} GB are free on {self.device}; use "
                "--device auto, which places what has no room there in memory and on disk, or --device cpu"
            )


def choose_placement(name: str | torch.device) -> Placement:
    """Where a person wants a model: on the device of that name (see :func:`choose_device`), or spread: ``auto``.

    Raises:
        PreflightError: the device is not there, or has no float64.
    """
    device = choose_device(name)
    if device.type != "cpu" and device.index is None:
        device = torch.empty(0, device=device).device  # which has a number, that what was placed there can be told by
    return Placement(device, spread=name == AUTO and device.type != "cpu")


@contextmanager
def computing(remedy: str = _QUANTIZING) -> Iterator[None]:
    """Products of float32 are float32's, whatever the process or its container chose: TF32 has three digits.

    Args:
        remedy: see :func:`enough_memory`.

    Raises:
        QuantlabError: in the place of torch's, where a device has no memory left.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with enough_memory(remedy):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def enough_memory(remedy: str = MEASURING) -> Iterator[None]:
    """Say plainly that a device has no memory left.

    Args:
        remedy: what a person can do then.

    Raises:
        QuantlabError: in the place of torch's.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise QuantlabError(
            f"the device has no memory left ({' '.join(str(error).split())[:200]}); {remedy}"
        ) from error


def _rooms() -> dict[int | str, int]:
    """Bytes of weights that each GPU takes, by number, and memory: accelerate would leave nothing for activations."""
    rooms: dict[int | str, int] = {"cpu": int(_USABLE * psutil.virtual_memory().available)}
    for number in range(torch.cuda.device_count()):
        room = free_bytes(torch.device("cuda", number))
        assert room is not None  # of a GPU of CUDA it is known
        rooms[number] = room
    return rooms


def free_bytes(device: torch.device) -> int | None:
    """Memory of a device that a run may plan with; None where torch does not say how much there is."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for its next tensors
    return int(_USABLE * (torch.cuda.mem_get_info(device)[0] + kept))
