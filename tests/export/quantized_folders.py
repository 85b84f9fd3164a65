"""Folders that quantlab wrote for tiny models, by recipes that need no data, and what their layers decode to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import quantlab
from quantlab.checkpoint.quantized import QuantizedFolder

RTN = {"quantizer": "rtn", "scale_search": "absmax", "granularity": 32}
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "initializer_range": 0.2,
}


def tiny(config: Any = None, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A model with random weights, its norms and biases too; a Llama if no config is given."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**SIZES)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith(".bias"):
            torch.nn.init.normal_(parameter, 0, 0.3)
    return model.to(dtype)


def quantized(folder: Path, changes: dict[str, Any], model: PreTrainedModel | None = None) -> Path:
    """The folder of a tiny model (a Llama if none is given), rounded to nearest by a recipe with these changes."""
    out = folder / "quantized"
    quantlab.quantize(tiny() if model is None else model, {**RTN, **changes}, out)
    return out


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """What each layer's codes stand for, corrections included: float32 by layer."""
    opened = QuantizedFolder(folder)
    return {name: opened.layer(name).dequantize() for name in opened.layers}


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of a short sequence, in float32."""
    return model(torch.arange(3, 43)[None] * 7 % 300).logits.float()
