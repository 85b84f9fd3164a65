"""Where a run computes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from quantlab.errors import PreflightError

# Whose tensors several processes can add up: see :class:`quantlab.engine.distributed.Ranks`.
_SHARED = ("cpu", "cuda")


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
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if processes > 1 and device.type != "cpu" and device.index is None:
            device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.ones((), dtype=torch.float64, device=device).item()  # sums that must not depend on their order
    except Exception as error:  # each kind of device has its own
        reason = " ".join(str(error).split())[:200]
        raise PreflightError(
            f"device {str(name)!r} cannot be used here ({reason}); use cpu, auto, or one that this torch has and that "
            "computes in float64, such as cuda or cuda:1"
        ) from error
    if processes > 1 and device.type not in _SHARED:
        raise PreflightError(
            f"device {str(name)!r}: {processes} processes can share a run on {' or '.join(_SHARED)}; start one process"
        )
    return device


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 in float32, whatever the process or its container chose: TF32 has three digits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where the CPU's is what counts, or torch does not say."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
