"""What transformers makes of a folder before any weight is read: config, class, dtype, an empty model."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from quantlab.checkpoint.placement import all_tensors
from quantlab.errors import CheckpointError


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a model that is not quantized.

    Raises:
        CheckpointError: there is none, it cannot be read, or the model is quantized already.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json; expected a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # unknown model types and damaged files come in many kinds
        raise CheckpointError(f"{folder}/config.json: {' '.join(str(error).split())}") from error
    for part in (config, config.get_text_config()):
        if quantized := getattr(part, "quantization_config", None):
            method = dict(quantized).get("quant_method", "unknown")
            raise CheckpointError(
                f"{folder}: is quantized already (quant_method {method}); start from the original model, or round "
                "what it decodes to a second time: --requantize"
            )
    return config


def model_class(config: PretrainedConfig, folder: Path) -> type[PreTrainedModel]:
    """The class that the config names, or else the one for text generation, or else the bare model.

    Raises:
        CheckpointError: transformers has no such class.
    """
    if config.architectures:
        name = config.architectures[0]
        found = getattr(transformers, name, None)
        if found is None:
            raise CheckpointError(
                f"{folder}: its architecture {name} is not part of transformers {transformers.__version__}; "
                "models with code of their own are not supported"
            )
        return found
    for auto in (AutoModelForCausalLM, AutoModel):
        mapping: Any = auto._model_mapping
        if type(config) in mapping:
            return mapping[type(config)]
    raise CheckpointError(f"{folder}: transformers has no model for {type(config).__name__}")


def auto_dtype(config: PretrainedConfig, stored: Iterable[torch.dtype]) -> torch.dtype:
    """What ``dtype="auto"`` means: the config's, or else that of the first floating point tensor."""
    dtype = config.dtype
    if dtype is None:
        return next((dtype for dtype in stored if dtype.is_floating_point), torch.float32)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def empty_model(kind: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device, its weights tied."""
    with torch.device("meta"):
        return kind._from_config(copy.deepcopy(config), dtype=dtype)


def fill_non_persistent_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that no file holds, as from_pretrained does; parameters stay where they are."""
    for _, _, _, tensor in all_tensors(model):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    for name, buffer in list(model.named_non_persistent_buffers()):
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    model.initialize_weights()


def untie(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Give these tied weights of an empty model tensors of their own."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        own = nn.Parameter(torch.empty_like(model.get_parameter(name)), requires_grad=False)
        setattr(model.get_submodule(parent), leaf, own)
        model.all_tied_weights_keys.pop(name, None)


def may_be_absent(model: PreTrainedModel, name: str) -> bool:
    """Whether the model's class says that files need not hold this tensor."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())
