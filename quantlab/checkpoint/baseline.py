"""What other tools make of a model as it is loaded: bitsandbytes' formats, to compare with.

Such a model is called `bitsandbytes:KIND:MODEL`, for example `bitsandbytes:nf4:demo`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from quantlab.checkpoint.load import load
from quantlab.checkpoint.placement import parameter_bytes
from quantlab.errors import CheckpointError

PREFIX = "bitsandbytes:"
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def split_baseline(name: str) -> tuple[str, str] | None:
    """``("nf4", "demo")`` of ``bitsandbytes:nf4:demo``; None for any other name.

    Raises:
        CheckpointError: bitsandbytes has no such kind, or no model is named.
    """
    if not name.startswith(PREFIX):
        return None
    kind, _, model = name.removeprefix(PREFIX).partition(":")
    if kind not in KINDS or not model:
        raise CheckpointError(f"{name}: write {PREFIX}KIND:MODEL with a kind out of {', '.join(KINDS)}")
    return kind, model


def load_baseline(kind: str, model: str | Path) -> PreTrainedModel:
    """A model in one of bitsandbytes' formats, quantized as it is loaded, computing in its own dtype.

    On a CPU its 4-bit layers decode their weights and multiply: correct, and slower than the original.

    Raises:
        CheckpointError: bitsandbytes is not installed or refuses the model.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # int8 says at every call that it computes in float16
    options = dict(KINDS[kind])
    if options.get("load_in_4bit"):
        options["bnb_4bit_compute_dtype"] = torch.bfloat16
    try:
        return load(model, quantization_config=BitsAndBytesConfig(**options))
    except ImportError as error:
        raise CheckpointError(f"{PREFIX}{kind}: bitsandbytes cannot be used here: {error}") from error


def baseline_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights with the scales that bitsandbytes keeps beside them."""
    return parameter_bytes(model) + sum(_scale_bytes(module) for module in model.modules())


def _scale_bytes(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    # The first forward pass of int8 moves the scales from the weight to the layer's state.
    scales = getattr(getattr(module, "state", None), "SCB", None)
    tensors = [getattr(weight, "SCB", None) if scales is None else scales]
    state = getattr(weight, "quant_state", None)
    while state is not None:
        tensors += [getattr(state, "absmax", None), getattr(state, "code", None)]
        state = getattr(state, "state2", None)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))
