"""The checks, and on a device whether the model says there what its codes mean: that device's kernels, and its memory.

What codes mean is computed on the CPU in any case; that is what the device is held against.
"""

from __future__ import annotations

from pathlib import Path

import torch
from quantlab_evals.machine import device_name

from quantlab.checkpoint.resolve import resolve
from quantlab.checkpoint.writer import weight_bytes
from quantlab.engine.device import choose_device, free_bytes
from quantlab.verification import loader
from quantlab.verification.digest import Digest
from quantlab.verification.verify import Check, Verification, compared
from quantlab.verification.verify import verify as verify_on_cpu


def verify(path: str | Path, against: str | Path | None = None, device: str | torch.device = "cpu") -> Verification:
    """Check a quantized model, or what was exported from one.

    Args:
        path: a folder that quantlab wrote, one that it exported, or a ``.gguf`` file.
        against: see :func:`quantlab.verification.verify.verify`.
        device: where it is loaded and run once more: ``cuda``, ``cuda:1``, or ``auto``: a GPU if there is one. ``cpu``:
            nowhere else.

    Raises:
        CheckpointError: there is no such model, or nothing to hold it against.
        PreflightError: there is no such device.
    """
    where = choose_device(device)
    done = verify_on_cpu(path, against)
    if where.type == "cpu" or not done.passed:
        return done
    digest = Digest.stored(done.path) or (Digest.stored(resolve(against)) if against is not None else None)
    return Verification(done.path, (*done.checks, check_on(where, done.path, digest)))


def check_on(device: torch.device, path: Path, digest: Digest | None) -> Check:
    """Load a folder on a device, in a process of its own and in its own dtype, and hold it against a digest."""
    name = f"on {device_name(device)} its predictions are those of the codes"
    if path.is_file() or digest is None:
        return Check(name, None, "not tried: " + ("there is no digest" if path.is_dir() else "it is no folder"))
    needed, room = weight_bytes(path), free_bytes(device)
    if room is not None and needed > room:
        return Check(name, None, f"not tried: it takes {needed / 1e9:.1f} GB, and {room / 1e9:.1f} GB are free there")
    said = loader.answer(path, "auto", digest, str(device))
    if "missing" in said or "OutOfMemoryError" in said.get("error", ""):
        return Check(name, None, f"not tried: {said.get('missing') or said['error']}")
    if "error" in said:
        return Check(name, False, said["error"])
    decoded = next(iter(said["decoded"].values()), "float32")
    return compared(name, digest, said["logprobs"], loader.rounds_inputs(path), said["computed"], decoded)
