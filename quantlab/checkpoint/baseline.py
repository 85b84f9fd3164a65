"""What other tools make of a model as it is loaded: bitsandbytes' formats and torchao's, to compare with.

Such a model is called `TOOL:KIND:MODEL`, for example `bitsandbytes:nf4:demo` or `torchao:int8:demo`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from quantlab.checkpoint.load import load
from quantlab.checkpoint.placement import parameter_bytes
from quantlab.errors import CheckpointError

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
"""bitsandbytes' kinds."""
_TORCHAO_GROUP = 64


def split_baseline(name: str) -> tuple[str, str] | None:
    """``("bitsandbytes:nf4", "demo")`` of ``bitsandbytes:nf4:demo``; None for any other name.

    Raises:
        CheckpointError: the tool has no such kind, or no model is named.
    """
    tool, _, rest = name.partition(":")
    if tool not in TOOLS or not rest:
        return None
    kind, _, model = rest.partition(":")
    kinds, _ = TOOLS[tool]
    if kind not in kinds or not model:
        raise CheckpointError(f"{name}: write {tool}:KIND:MODEL with a kind out of {', '.join(kinds)}")
    return f"{tool}:{kind}", model


def load_baseline(baseline: str, model: str | Path, **options: Any) -> PreTrainedModel:
    """A model in one of another tool's formats, quantized as it is loaded, computing in its own dtype.

    On a CPU bitsandbytes' 4-bit layers decode their weights and multiply: correct, and slower than the original.

    Args:
        baseline: ``TOOL:KIND``.
        model: what a person calls it.
        **options: as :func:`quantlab.load` takes them.

    Raises:
        CheckpointError: the tool is not installed or refuses the model.
    """
    tool, _, kind = baseline.partition(":")
    try:
        return load(model, quantization_config=TOOLS[tool][1](kind), **options)
    except (ImportError, NotImplementedError, AssertionError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{baseline}: {tool} cannot be used here: {said}") from error


def _bitsandbytes(kind: str) -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # int8 says at every call that it computes in float16
    options = dict(KINDS[kind])
    if options.get("load_in_4bit"):
        options["bnb_4bit_compute_dtype"] = torch.bfloat16
    return BitsAndBytesConfig(**options)


def _torchao(kind: str) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8" else Int4WeightOnlyConfig(group_size=_TORCHAO_GROUP))


TOOLS: dict[str, tuple[tuple[str, ...], Callable[[str], Any]]] = {
    "bitsandbytes": (tuple(KINDS), _bitsandbytes),
    "torchao": (("int4", "int8"), _torchao),
}
"""The tools: their kinds, and what makes transformers' configuration of one."""


def baseline_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights with the scales that another tool keeps beside them."""
    quantized = [(layer, _quantized_bytes(layer)) for layer in _quantized(model)]
    nominal = sum(layer.weight.numel() * layer.weight.element_size() for layer, _ in quantized)
    return parameter_bytes(model) - nominal + sum(stored for _, stored in quantized)


def baseline_bits(model: nn.Module) -> float | None:
    """Bits a weight of the layers that another tool quantized, scales counted; None if there are none."""
    layers = _quantized(model)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return 8 * sum(_quantized_bytes(layer) for layer in layers) / weights if weights else None


def _quantized(model: nn.Module) -> list[Any]:
    linear = [module for module in model.modules() if hasattr(module, "in_features") and hasattr(module, "weight")]
    return [module for module in linear if _beside(module) or hasattr(module.weight, "__tensor_flatten__")]


def _quantized_bytes(layer: Any) -> int:
    return _stored(layer.weight) + sum(_stored(tensor) for tensor in _beside(layer))


def _stored(tensor: Any) -> int:
    """Bytes of a tensor, or of those that one of torchao's is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    return sum(_stored(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def _beside(module: Any) -> list[torch.Tensor]:
    """The scales that bitsandbytes keeps beside a layer's weight."""
    weight = module.weight
    # The first forward pass of int8 moves the scales from the weight to the layer's state.
    scales = getattr(getattr(module, "state", None), "SCB", None)
    tensors = [getattr(weight, "SCB", None) if scales is None else scales]
    state = getattr(weight, "quant_state", None)
    while state is not None:
        tensors += [getattr(state, "absmax", None), getattr(state, "code", None)]
        state = getattr(state, "state2", None)
    return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
