"""The low-rank corrections of a quantized model as an adapter that PEFT loads.

For checkpoints of the same codes in a format that has no place for corrections: a layer's ``left @ right`` becomes a
LoRA pair ``B @ A`` with a scaling of 1. In PEFT's layout a layer ``name`` of the model has the tensors
``base_model.model.<name>.lora_A.weight [rank, in]`` and ``lora_B.weight [out, rank]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quantlab.checkpoint.quantized import QuantizedFolder
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.errors import CheckpointError
from quantlab.numerics import LowRank

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(folder: str | Path, out: str | Path, base: str | None = None) -> Path:
    """Write the corrections of a quantized model as a PEFT adapter, for the same codes without them.

    The folder itself holds its corrections already: with quantlab the adapter must not be added to it.

    Args:
        folder: what ``quantlab.quantize`` wrote.
        out: the folder to write; it must not exist, or be empty.
        base: the name or folder of the model that the adapter is for, to be written into its config.

    Returns:
        ``out``.

    Raises:
        CheckpointError: no quantized model, one without corrections, or ``out`` cannot be written.
    """
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists already; choose another folder for the adapter")
    opened = QuantizedFolder(folder)
    corrected = {name: storage for name, storage in sorted(opened.layers.items()) if storage.low_rank}
    if not corrected:
        raise CheckpointError(
            f"{folder}: no layer has a low-rank correction; quantize with one, for example --set compensation=lorc"
        )
    tensors: dict[str, torch.Tensor] = {}
    for name, storage in corrected.items():
        stored = [part for part in ("left", "right", "scales") if f"low_rank_{part}" in storage.specs()]
        low_rank = LowRank(**{part: opened.files.read(f"{name}.low_rank_{part}") for part in stored})
        dtype = torch.float32 if low_rank.scales is not None else low_rank.left.dtype
        tensors[f"base_model.model.{name}.lora_A.weight"] = low_rank.right.to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = low_rank.scaled_left(dtype)
    writer = CheckpointWriter(out)
    writer.write(ADAPTER, tensors)
    writer.write_json(CONFIG, _adapter_config({name: storage.low_rank for name, storage in corrected.items()}, base))
    return out


def _adapter_config(ranks: Mapping[str, int], base: str | None) -> dict[str, Any]:
    """PEFT scales each pair by alpha / rank: with alpha = rank, by 1."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": list(ranks),
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": dict(ranks),
        "alpha_pattern": dict(ranks),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
