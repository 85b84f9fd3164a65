"""A solved block as it is written, and a block made whole again from what was written."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from quantlab.checkpoint.native import layer_tensors
from quantlab.engine.architecture import Architecture, get_weight, replace_tensor, set_weight
from quantlab.engine.report import LayerReport
from quantlab.engine.solve import Answer
from quantlab.numerics import QTensor
from quantlab.storage import Storage


class PackedBlock(NamedTuple):
    """What is written of a block.

    Attributes:
        tensors: by the names of the checkpoint.
        reports: of its quantized layers, in the order in which they were solved.
        storages: how each of these is stored.
    """

    tensors: dict[str, torch.Tensor]
    reports: list[LayerReport]
    storages: dict[str, Storage]

    @classmethod
    def of(
        cls,
        block: str,
        model: nn.Module,
        architecture: Architecture,
        answers: Iterable[Answer],
        activations: Mapping[str, str],
    ) -> PackedBlock:
        """Codes and scales of the layers that are solved, everything else of the block as the model holds it then.

        Args:
            block: its name, or ``OUTSIDE``.
            model: with this block loaded.
            architecture: the model's parts.
            answers: of the block's quantized layers; each is packed as it comes, so that codes need not wait.
            activations: what inputs are rounded to, by layer.
        """
        tensors: dict[str, torch.Tensor] = {}
        reports: list[LayerReport] = []
        storages: dict[str, Storage] = {}
        for answer in answers:
            name = answer.report.layer
            tensors |= layer_tensors(name, answer.qtensor)
            reports.append(answer.report)
            storages[name] = Storage.of(
                answer.qtensor,
                bias=getattr(model.get_submodule(name), "bias", None) is not None,
                activations=activations[name],
            )
        return cls(_others(block, model, architecture, storages) | tensors, reports, storages)


def _others(
    block: str, model: nn.Module, architecture: Architecture, quantized: Container[str]
) -> dict[str, torch.Tensor]:
    """A block's tensors but for the weights of ``quantized`` layers; tied ones once."""
    tensors: dict[str, torch.Tensor] = {}
    stored: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict().items():
        owner = name.removesuffix(".weight")
        tied = (tensor.data_ptr(), tensor.shape) in stored
        if architecture.place_of(name) == block and owner not in quantized and not tied:
            tensors[name] = tensor.cpu()
            stored.add((tensor.data_ptr(), tensor.shape))
    return tensors


def restore(
    model: nn.Module, quantized: Mapping[str, QTensor], rest: Mapping[str, torch.Tensor], device: torch.device
) -> None:
    """Give a block of ``model`` everything that is stored of it: layers decoded, other tensors as they are."""
    for name, qtensor in quantized.items():
        module = model.get_submodule(name)
        set_weight(module, qtensor.to(device).dequantize(get_weight(module).dtype))
    for name, tensor in rest.items():
        replace_tensor(model, name, tensor.to(device))
