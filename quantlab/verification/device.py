"""The checks, and on a device whether the model says there what its codes mean: that device's kernels, and its memory.

What codes mean is computed on the CPU in any case; that is what the device is held against.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from quantlab_evals.machine import device_name

from quantlab.checkpoint.quantized import QuantizedFolder
from quantlab.checkpoint.resolve import resolve
from quantlab.checkpoint.writer import weight_bytes
from quantlab.engine.device import choose_device, free_bytes
from quantlab.errors import CheckpointError
from quantlab.verification.digest import Digest
from quantlab.verification.verify import Check, Verification
from quantlab.verification.verify import verify as verify_on_cpu

# Mean divergence, nats a position, up to which it counts as the same: a device computes in the model's own dtype.
# Where inputs are rounded to 8 bits, sums that differ in their last digit put some of them on the other side of a step.
_SAME, _SAME_ROUNDED = 2e-2, 1e-1
_SECONDS = 1800
# `fresh.py` where what is made without a word of a device is made on this one.
_PROGRAM = """
import runpy, sys, torch
device, *sys.argv = sys.argv[1:]
torch.set_default_device(device)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


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
    try:
        kinds = {storage.activations for storage in QuantizedFolder(path).layers.values()}
    except CheckpointError:
        kinds = None  # another format, whose loader knows
    said = _said(device, path, digest, ours=kinds is not None)
    if "missing" in said or "OutOfMemoryError" in said.get("error", ""):
        return Check(name, None, f"not tried: {said.get('missing') or said['error']}")
    if "error" in said:
        return Check(name, False, said["error"])
    far, limit = digest.divergence(said["logprobs"]), _SAME if kinds == {"none"} else _SAME_ROUNDED
    return Check(name, far <= limit, f"{far:.1e} nats a token apart, {limit:g} allowed")


def _said(device: torch.device, folder: Path, digest: Digest, *, ours: bool) -> dict[str, Any]:
    """What `fresh.py` answers."""
    program = Path(__file__).with_name("fresh.py")
    command = [sys.executable, "-c", _PROGRAM, str(device), str(program), str(folder), "auto", str(int(ours))]
    try:
        done = subprocess.run(
            command, input=json.dumps(digest.to_dict()), capture_output=True, text=True, check=False, timeout=_SECONDS
        )
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {_SECONDS} seconds"}
    except (IndexError, ValueError):
        return {"error": f"the process ended with code {done.returncode}: {' '.join(done.stderr.split())[-400:]}"}
