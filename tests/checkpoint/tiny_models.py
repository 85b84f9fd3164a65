"""Tiny models of several architectures, and a folder that quantlab would have written for one."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantlab.checkpoint.native import layer_tensors, quantization_config
from quantlab.checkpoint.writer import CheckpointWriter, shard_name
from quantlab.numerics import QTensor, apply_scales, choose_scales, grid
from quantlab.storage import Storage

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_BERT = {k: v for k, v in _SIZES.items() if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
_CONFIGS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_SIZES, "tie_word_embeddings": False}),
    "llama-tied": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_SIZES, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 80,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_SIZES, **_MOE, "head_dim": 16}),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    ),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**_SIZES, "num_experts": 4, "num_experts_per_tok": 2}),
    "granite-moe": (
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", _BERT),
}
NAMES = list(_CONFIGS)
MOE_NAMES = ["mixtral", "qwen3-moe", "gpt-oss", "olmoe", "granite-moe"]


def tiny_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with random weights, the same at every call."""
    model_class, config_class, options = _CONFIGS[name]
    config = getattr(transformers, config_class)(**options, experts_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config)
    for parameter in model.parameters():
        # Norms and biases get random values too, so that a mix-up shows. Rotary frequencies stay float32.
        parameter.data = parameter.data.add_(torch.randn_like(parameter) * 0.05).to(dtype)
    return model.eval()


def save_tiny(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> Path:
    """The model's folder as ``save_pretrained`` writes it (experts one by one, as on the hub)."""
    tiny_model(name, dtype).save_pretrained(folder, **options)
    return folder


def linear_layers(model: nn.Module, *, head: bool = True) -> dict[str, nn.Module]:
    """Every layer that can be quantized, by name."""
    kinds = (nn.Linear, Conv1D)
    found = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: module for name, module in found.items() if head or not name.endswith(("lm_head", "decoder"))}


def quantized(layer: nn.Module, form: int) -> QTensor:
    """The layer's weight in one of several forms, chosen by ``form``."""
    weight = layer.weight.detach().float()
    weight = (weight.T if isinstance(layer, Conv1D) else weight).contiguous()
    bits, granularity, symmetric, dtype = [
        (4, 16, True, torch.bfloat16),
        (3, "channel", False, torch.float16),
        (8, "tensor", True, torch.float32),
        (5, 32, False, torch.float32),
    ][form % 4]
    table = grid(f"int{bits}")
    stored = str(dtype).removeprefix("torch.")
    scales = choose_scales(weight, table, granularity, symmetric=symmetric, search=False, stored=stored)
    return QTensor.of(apply_scales(weight, table, scales), scales, table)


def write_quantized(model: PreTrainedModel, folder: Path, *, head: bool = True) -> dict[str, QTensor]:
    """What the engine would write for ``model`` (experts taken apart), and the layers that it quantized."""
    layers, storages, tensors = {}, {}, {}
    for form, (name, layer) in enumerate(linear_layers(model, head=head).items()):
        layers[name] = quantized(layer, form)
        storages[name] = Storage.of(layers[name], bias=layer.bias is not None)
    replaced = {f"{name}.weight" for name in layers}
    for name, tensor in model.named_parameters():  # each tied tensor once, as the engine writes them
        if name not in replaced:
            tensors[name] = tensor.detach()
    tied = {id(p): n for n, p in model.named_parameters(remove_duplicate=False) if n not in replaced}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in replaced and tied[id(parameter)] == name:
            tensors[name] = parameter.detach()
    for name, qtensor in layers.items():
        tensors |= layer_tensors(name, qtensor)
    for name, buffer in model.named_buffers():
        parent, _, leaf = name.rpartition(".")
        if leaf not in model.get_submodule(parent)._non_persistent_buffers_set:
            tensors[name] = buffer
    writer = CheckpointWriter(folder)
    halves = sorted(tensors)[::2], sorted(tensors)[1::2]
    for i, half in enumerate(halves):
        writer.write(shard_name(i + 1, 2), {name: tensors[name] for name in half})
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    writer.finish(model.config, quantization_config(storages), None)
    return layers


def put_dequantized(model: PreTrainedModel, layers: dict[str, QTensor]) -> PreTrainedModel:
    """Each layer as a plain linear layer with the weight that its codes stand for."""
    for name, qtensor in layers.items():
        layer = model.get_submodule(name)
        dense = nn.Linear(qtensor.shape[1], qtensor.shape[0], bias=layer.bias is not None)
        dense.weight = nn.Parameter(qtensor.dequantize(model.dtype))
        dense.bias = layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, dense)
    return model.eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of two short sequences."""
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        return model(input_ids=ids).logits
