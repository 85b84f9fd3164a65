"""A model that is quantized already, as the source of another quantization: its weights decoded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from quantlab.checkpoint.native import QUANT_METHOD
from quantlab.checkpoint.placement import Select, selected
from quantlab.checkpoint.quantized import QuantizedFolder
from quantlab.checkpoint.skeleton import empty_model, fill_non_persistent_buffers, model_class, untie
from quantlab.checkpoint.source import ModelSource, ModuleSource, digest
from quantlab.errors import CheckpointError

# Whose layers transformers loads as plain ones where its config is asked to.
_DEQUANTIZING = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}


def quant_method_of(folder: Path) -> str | None:
    """What a folder's config.json says that it is quantized by; None if it is not, or has no readable config."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        parts = [config, config.get("text_config") or {}]
        found = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
        return None if found is None else str(found.get("quant_method", "unknown"))
    except (OSError, ValueError, AttributeError):
        return None


def open_decoded(folder: Path) -> ModelSource:
    """The decoded weights of a quantized folder: quantlab's a part at a time, others' whole, by transformers.

    Raises:
        CheckpointError: transformers cannot load it here, or not decode it.
    """
    return DecodedFolder(folder) if quant_method_of(folder) == QUANT_METHOD else _decoded_by_transformers(folder)


class DecodedFolder(ModelSource):
    """A folder that quantlab wrote, its layers decoded when they are loaded."""

    def __init__(self, folder: Path) -> None:
        self._opened = QuantizedFolder(folder)
        self.folder = Path(folder)
        self.config = self._opened.original_config()
        self.dtype = self._opened.dtype

    def skeleton(self) -> PreTrainedModel:
        """See :meth:`ModelSource.skeleton`."""
        return self._opened.skeleton()

    def load(self, model: nn.Module, select: Select = "") -> None:
        """See :meth:`ModelSource.load`."""
        wanted = {places[0][2] for tensor, places in selected(model, select) if tensor.is_meta}
        if wanted:
            self._opened.load(model, wanted)

    def fingerprint(self) -> str:
        """See :meth:`ModelSource.fingerprint`; of the files' sizes and times of change, and the config."""
        stats = [(file.name, file.stat()) for file in self._opened.files.files]
        return digest([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats], self._opened.config)


def _decoded_by_transformers(folder: Path) -> ModuleSource:
    """Load a model with its own quantizer, and take every weight that the plain model has."""
    method = quant_method_of(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        options: dict[str, Any] = {"dtype": "auto", "local_files_only": True}
        if method in _DEQUANTIZING:
            options["quantization_config"] = getattr(transformers, _DEQUANTIZING[method])(dequantize=True)
        kind = model_class(config, folder)
        loaded: Any = kind.from_pretrained(folder, **options)
        if method not in _DEQUANTIZING:
            loaded = _dequantized(loaded)
    except CheckpointError:
        raise
    except Exception as error:  # each quantizer raises its own kinds
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: transformers cannot decode its {method} weights here ({reason})") from error
    return ModuleSource(_plain(folder, copy.deepcopy(config), loaded, str(method)), folder)


def _dequantized(model: Any) -> Any:
    """The model with plain layers, in place; some quantizers put them there when it first runs."""
    try:
        return model.dequantize()
    except (NotImplementedError, AttributeError):
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long))
        return model


def _plain(folder: Path, config: Any, loaded: PreTrainedModel, method: str) -> PreTrainedModel:
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    plain = empty_model(model_class(config, folder), config, loaded.dtype)
    have = loaded.state_dict()
    untie(plain, [name for name, origin in plain.all_tied_weights_keys.items() if _differ(have, name, origin)])
    fill_non_persistent_buffers(plain)
    for name, tensor in plain.state_dict().items():
        found = have.get(name)
        if found is None or found.shape != tensor.shape or (tensor.is_floating_point() and not _is_dense(found)):
            raise CheckpointError(
                f"{folder}: {name} is not decoded by transformers ({method}); start from the original model"
            )
    plain.load_state_dict(
        {name: have[name].to(tensor.dtype) for name, tensor in plain.state_dict().items()}, assign=True
    )
    plain.tie_weights()
    return plain.requires_grad_(False).eval()


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16, torch.float32) and not tensor.is_meta


def _differ(have: dict[str, torch.Tensor], name: str, origin: str) -> bool:
    return name in have and origin in have and not torch.equal(have[name], have[origin])
