"""Where a run computes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from quantlab.errors import PreflightError, QuantlabError

# Beside the CPU, whose tensors several processes can add up: see :class:`quantlab.engine.distributed.Ranks`.
_SHARED = "cuda"
# Of the free memory: the rest is for what libraries take, and for gaps.
_USABLE = 0.9


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


@contextmanager
def computing() -> Iterator[None]:
    """Products of float32 are float32's, whatever the process or its container chose: TF32 has three digits.

    Raises:
        QuantlabError: in the place of torch's, where a device has no memory left.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise QuantlabError(
            f"the device has no memory left ({' '.join(str(error).split())[:200]}); what was done is kept, and the "
            "same command goes on with it: end what else is on the device, or start anew with shorter "
            "calibration sequences, with a recipe that needs less (w4-gptq-fast), or with --device cpu"
        ) from error
    finally:
        torch.set_float32_matmul_precision(before)


def free_bytes(device: torch.device) -> int | None:
    """Memory of a device that a run may plan with; None where torch does not say how much there is."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for its next tensors
    return int(_USABLE * (torch.cuda.mem_get_info(device)[0] + kept))
