"""A folder that quantlab wrote, read again: its layers as quantized tensors, everything else as it is stored."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantlab.checkpoint.native import parse_quantization_config, read_layer
from quantlab.checkpoint.placement import assign, selected
from quantlab.checkpoint.skeleton import auto_dtype, empty_model, fill_non_persistent_buffers, model_class, untie
from quantlab.checkpoint.weights import WeightFiles
from quantlab.errors import CheckpointError
from quantlab.experts import unfuse_experts
from quantlab.numerics import QTensor

DIGEST = "verification.json"
"""What the model says of a few prompts, kept beside it: see :mod:`quantlab.verification`."""

INEXACT = "inexact_layers"
"""In an export's digest, and under ``quantlab.`` in a GGUF file: how many layers are not what the codes meant."""

# Bytes of tensors, as they are stored, that are worked on at once: what a shard of a new folder comes to hold.
_PART = 1 << 30


class QuantizedFolder:
    """A quantized model on disk, a layer at a time.

    Attributes:
        folder: where it is.
        config: what config.json says.
        layers: how each quantized layer is stored, by name.
        kept: the names of all tensors that belong to no quantized weight: norms, embeddings, biases.
        files: the tensors as they are stored.

    Raises:
        CheckpointError: not such a folder, or one that is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        try:
            self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder}: has no readable config.json ({error})") from error
        stored = self.config.get("quantization_config")
        if not isinstance(stored, dict):
            raise CheckpointError(
                f"{self.folder}: is not quantized; give a folder that `quantlab quantize` wrote, or quantize it first"
            )
        self.layers = parse_quantization_config(stored)
        self.files = WeightFiles(self.folder)
        belonging = {f"{name}.{leaf}": name for name, storage in self.layers.items() for leaf in storage.specs()}
        if missing := sorted(belonging.keys() - self.files.stored.keys()):
            raise CheckpointError(f"{missing[0]}: no weight file has it; the folder is not complete")
        self.kept = [name for name in self.files.stored if name not in belonging]

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors that are not quantized."""
        return auto_dtype(self.original_config(), (stored.dtype for stored in self.files.stored.values()))

    @property
    def rounds_inputs(self) -> bool:
        """Whether any layer rounds its inputs to 8 bits as they come."""
        return any(storage.activations != "none" for storage in self.layers.values())

    def layer(self, name: str) -> QTensor:
        """The weight of a quantized layer.

        Raises:
            CheckpointError: what is stored is not what config.json says.
        """
        storage = self.layers[name]
        tensors = {f"{name}.{leaf}": self.files.read(f"{name}.{leaf}") for leaf in storage.specs()}
        return read_layer(tensors, name, storage)

    def parts(self) -> Iterator[tuple[list[str], list[str]]]:
        """The names of layers and of kept tensors that lie near each other, at most a gigabyte together."""
        places = [(name, f"{name}.codes", True) for name in self.layers]
        places += [(name, name, False) for name in self.kept]
        order = {file: index for index, file in enumerate(self.files.files)}
        places.sort(key=lambda place: (order[self.files.stored[place[1]].file], place[0]))
        layers: list[str] = []
        kept: list[str] = []
        size = 0
        for name, tensor, is_layer in places:
            stored = self.files.stored[tensor]
            bytes_here = stored.dtype.itemsize * torch.Size(stored.shape).numel()
            if size and size + bytes_here > _PART:
                yield layers, kept
                layers, kept, size = [], [], 0
            (layers if is_layer else kept).append(name)
            size += bytes_here
        yield layers, kept

    def original_config(self) -> PretrainedConfig:
        """The model's config without what it says of the quantization."""
        config = AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        config = copy.deepcopy(config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config

    def skeleton(self, *, unfuse: bool = True, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model without weights and with plain layers; a quantized head is not tied.

        Args:
            unfuse: take a mixture's experts apart, as the folder has them.
            dtype: in which the model is to be; its own if None.
        """
        config = self.original_config()
        model = empty_model(model_class(config, self.folder), config, dtype or self.dtype)
        untie(model, [name for name in model.all_tied_weights_keys if name.removesuffix(".weight") in self.layers])
        fill_non_persistent_buffers(model)
        if unfuse:
            unfuse_experts(model)
        return model.requires_grad_(False).eval()

    def load(self, model: nn.Module, names: set[str]) -> None:
        """Fill these parameters and persistent buffers of a skeleton, quantized weights decoded.

        Raises:
            CheckpointError: the folder has nothing for one of them.
        """
        ties = getattr(model, "all_tied_weights_keys", {})
        for tensor, places in selected(model, lambda name: name in names):
            known = [name for _, _, name in places] + [ties[name] for _, _, name in places if name in ties]
            module, leaf, _ = places[0]
            layer = next(
                (name.removesuffix(".weight") for name in known if name.removesuffix(".weight") in self.layers), None
            )
            if leaf == "weight" and layer is not None:
                value = self.layer(layer).dequantize(tensor.dtype)
                value = value.T.contiguous() if isinstance(module, Conv1D) else value
            elif stored := [name for name in known if name in self.files.stored]:
                value = self.files.read(stored[0]).to(tensor.dtype)
            else:
                raise CheckpointError(f"{known[0]}: no weight file has it; the folder is not complete")
            if value.shape != tensor.shape:
                raise CheckpointError(
                    f"{known[0]}: has shape {list(value.shape)}, the model wants {list(tensor.shape)}"
                )
            assign(places, value)
