"""A folder as its users load it, in a process of its own: what it takes, and what came of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig

from quantlab.checkpoint.native import QUANT_METHOD
from quantlab.checkpoint.quantized import DIGEST, INEXACT, QuantizedFolder
from quantlab.checkpoint.skeleton import empty_model, model_class
from quantlab.checkpoint.weights import WeightFiles
from quantlab.checkpoint.writer import weight_bytes
from quantlab.errors import CheckpointError
from quantlab.export import compressed_tensors
from quantlab.verification.digest import Digest

_SECONDS = 1800
_LIBRARIES = 1 << 29
_PROGRAM = str(Path(__file__).with_name("fresh.py"))
# The program where what is made without a word of a device is made on this one.
_ON_DEVICE = """
import runpy, sys, torch
device, *sys.argv = sys.argv[1:]
torch.set_default_device(device)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def answer(folder: Path, dtype: str, digest: Digest, device: str = "cpu") -> dict[str, Any]:
    """What `fresh.py` says of a folder.

    Args:
        folder: what transformers loads.
        dtype: in which, ``float32`` or ``auto``: the model's own.
        digest: which prompts to run, and of which tokens to tell.
        device: where.
    """
    program = [_PROGRAM] if device == "cpu" else ["-c", _ON_DEVICE, device, _PROGRAM]
    command = [sys.executable, *program, str(folder), dtype, str(int(quant_method(folder) == QUANT_METHOD))]
    try:
        done = subprocess.run(
            command, input=json.dumps(digest.to_dict()), capture_output=True, text=True, check=False, timeout=_SECONDS
        )
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {_SECONDS} seconds"}
    except (IndexError, ValueError):
        return {"error": f"the process ended with code {done.returncode}: {' '.join(done.stderr.split())[-400:]}"}


def affordable(folder: Path) -> tuple[str | None, str]:
    """In which dtype there is memory to load a folder, and what to say of it: float32, else its own, else none."""
    full = bytes_needed(folder, torch.float32)
    if enough_memory(full):
        return "float32", ""
    short = f"takes about {full / 1e9:.1f} GB, and {psutil.virtual_memory().available / 1e9:.1f} GB are free"
    if quant_method(folder) != QUANT_METHOD and enough_memory(bytes_needed(folder, torch.bfloat16)):
        return "auto", f"not in float32, which {short}"
    return None, f"not tried: it {short}"


def enough_memory(size: int) -> bool:
    """Whether so many bytes are free."""
    return size <= psutil.virtual_memory().available


def bytes_needed(folder: Path, dtype: torch.dtype) -> int:
    """What loading and running a folder in a dtype takes, about.

    Ours stays as it is stored, but for tensors of 16 bits. Other formats are decoded as a whole, at the first forward.
    """
    method = quant_method(folder)
    if method == QUANT_METHOD:
        stored = WeightFiles(folder).stored.values()
        wider = sum(each.bytes for each in stored if each.dtype in (torch.bfloat16, torch.float16))
        return int(1.3 * (weight_bytes(folder) + wider)) + _LIBRARIES
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = empty_model(model_class(config, folder), config, dtype)
    decoded = bytes_of(sum(parameter.numel() for parameter in model.parameters()), dtype)
    return decoded if method is None else decoded + weight_bytes(folder)


def bytes_of(weights: int, dtype: torch.dtype) -> int:
    """What loading and running a model of so many weights takes, about."""
    return int(1.1 * weights * dtype.itemsize) + _LIBRARIES


def quant_method(folder: Path) -> str | None:
    """Who is to read a folder, by its config.json; None for a model that is not quantized.

    Raises:
        CheckpointError: it has none that can be read.
    """
    return _quantization_config(folder).get("quant_method")


def inexact_layers(folder: Path) -> int:
    """How many layers of an exported folder are not what the codes meant, as the export noted."""
    try:
        return int(json.loads((folder / DIGEST).read_text(encoding="utf-8")).get(INEXACT, 0))
    except (OSError, ValueError, AttributeError):
        return 0


def rounds_inputs(folder: Path) -> bool:
    """Whether a model says of any layer that its inputs are rounded as they come."""
    if quant_method(folder) == QUANT_METHOD:
        return QuantizedFolder(folder).rounds_inputs
    return compressed_tensors.rounds_inputs(_quantization_config(folder))


def _quantization_config(folder: Path) -> dict[str, Any]:
    """What a model's config.json says of its quantization; nothing if it is not quantized."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: has no readable config.json ({error})") from error
    return config.get("quantization_config") or {}
