"""Teaches transformers the ``quantlab`` format: import this module, and ``from_pretrained`` loads it.

Before the weights are loaded the model's linear layers are replaced by empty ``QuantLinear`` modules whose
buffers have exactly the names, shapes and dtypes of the checkpoint. transformers then loads them as any other
tensors, and ``save_pretrained`` writes them back as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantlab.checkpoint.native import QUANT_METHOD, check_table, parse_quantization_config
from quantlab.errors import CheckpointError, QuantlabError
from quantlab.experts import UnfusedExperts, unfuse_experts
from quantlab.nn import QuantEmbedding, QuantLinear
from quantlab.storage import Storage


class QuantlabConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of config.json, as :func:`native.quantization_config` wrote it."""

    def __init__(self, **stored: Any) -> None:
        stored.pop("quant_method", None)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment] # any string will do
        for key, value in stored.items():
            setattr(self, key, value)

    def storages(self) -> dict[str, Storage]:
        """The quantized layers and how each is stored.

        Raises:
            CheckpointError: the description cannot be read.
        """
        return parse_quantization_config(vars(self))

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a user may change while loading: nothing."""
        return {}


class QuantlabQuantizer(HfQuantizer):
    """What transformers asks while it loads or saves a quantized model."""

    requires_calibration = True
    quantization_config: QuantlabConfig

    def __init__(self, quantization_config: QuantlabConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.layers: dict[str, Storage] = {}  # by the names of the model that is being loaded

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        unfuse_experts(model)
        self.layers = _layers_of(model, self.quantization_config.storages())
        for name, storage in self.layers.items():
            _replace(model, name, storage)
        _untie(model, self.layers)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name, storage in self.layers.items():
            layer = model.get_submodule(name)
            if isinstance(layer, QuantLinear | QuantEmbedding) and not layer.table.is_meta:
                check_table(name, storage, layer.table)
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The tensors of a quantized layer keep their dtypes, whatever ``dtype`` the model is loaded in."""
        layer, _, leaf = str(converter.target_patterns[0]).rpartition(".")
        if layer in self.layers and leaf in self.layers[layer].specs():
            return None
        return super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, *_: Any) -> list[Any]:
        """None: the checkpoint has the model's own names, and experts stay apart."""
        return []

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` writes the same format again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the quantized weights can be trained."""
        return False

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        if any(isinstance(module, UnfusedExperts) for module in model.modules()):
            raise QuantlabError(f"{type(model).__name__}: a mixture of experts cannot be dequantized in place")
        for name in self.layers:
            layer = model.get_submodule(name)
            if isinstance(layer, QuantLinear | QuantEmbedding):
                _set(model, name, _dense(layer, dtype or model.dtype))
        return model


def _layers_of(model: PreTrainedModel, layers: Mapping[str, Storage]) -> dict[str, Storage]:
    """The layers by their names in ``model``, which may be the checkpoint's model without its head.

    Raises:
        CheckpointError: the model has no layer of that name, or one of another shape.
    """
    named = set(model.config.architectures or [])
    same_class = not named or type(model).__name__ in named
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name, storage in layers.items():
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if _has(model, candidate):
                _check_fits(model.get_submodule(candidate), candidate, storage)
                found[candidate] = storage
                break
        else:
            if same_class or name.startswith(prefix):
                raise CheckpointError(
                    f"{name}: config.json says that this layer is quantized, but {type(model).__name__} has "
                    "none of this name; the config is another model's, or transformers renamed the layer"
                )
    return found


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _check_fits(module: nn.Module, name: str, storage: Storage) -> None:
    if isinstance(module, Conv1D):
        shape = (module.weight.shape[1], module.weight.shape[0])
    elif isinstance(module, nn.Linear | nn.Embedding):
        shape = (module.weight.shape[0], module.weight.shape[1])
    else:
        raise CheckpointError(
            f"{name}: is a {type(module).__name__}, the checkpoint has a linear layer or embedding for it"
        )
    stored = (storage.out_features, storage.in_features)
    if shape != stored:
        raise CheckpointError(
            f"{name}: the model has {list(shape)}, the checkpoint {list(stored)}; config.json was edited, or "
            "belongs to another model"
        )


def _replace(model: nn.Module, name: str, storage: Storage) -> None:
    kind = QuantEmbedding if isinstance(model.get_submodule(name), nn.Embedding) else QuantLinear
    with torch.device("meta"):
        layer = kind(storage)
    _set(model, name, layer.train(model.training))


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _untie(model: PreTrainedModel, layers: Mapping[str, Storage]) -> None:
    """A quantized layer (an ``lm_head``, an embedding) has a weight of its own, whatever it was tied to."""
    gone = {f"{name}.weight" for name in layers}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and isinstance(module._tied_weights_keys, dict):
            prefix = f"{name}." if name else ""
            module._tied_weights_keys = {
                target: origin for target, origin in module._tied_weights_keys.items() if prefix + target not in gone
            }
            module.all_tied_weights_keys = {
                target: origin for target, origin in module.all_tied_weights_keys.items() if prefix + target not in gone
            }


def _dense(layer: QuantLinear | QuantEmbedding, dtype: torch.dtype) -> nn.Module:
    weight = layer.to_qtensor().dequantize(dtype)
    if isinstance(layer, QuantEmbedding):
        return nn.Embedding.from_pretrained(weight).train(layer.training)
    dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        dense.bias = layer.bias
    return dense.train(layer.training)


def register() -> None:
    """Enter the format in transformers' registries; a second time changes nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(QuantlabConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(QuantlabQuantizer)


register()
