"""Where the blocks, the linear layers and their shared inputs are, in any Hugging Face model.

Nothing here asks for a model's name. Blocks are the items of the outermost module lists that contain linear layers;
which layers share an input is seen by running a few tokens and looking which layers were handed the same tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantlab.errors import PreflightError
from quantlab.experts import UnfusedExperts

# The name of what is in no block: embeddings, the last norm, the head.
OUTSIDE = ""

# Subclasses of nn.Linear that compute what nn.Linear computes. Other subclasses (routers, layers of several groups) may
# not, and stay as they are.
_PLAIN_SUBCLASSES = frozenset({"transformers.models.falcon.modeling_falcon.FalconLinear"})


@dataclass(frozen=True)
class Architecture:
    """The parts of a model that matter here, by module name.

    Attributes:
        blocks: names of the blocks, in the order in which they are defined.
        layers: for each block its linear layers, by full name.
        outside: linear layers that are in no block (heads, projections).
        embeddings: plain embeddings that are in no block.
        routed: layers of experts, which see only the tokens that are routed to them.
    """

    blocks: tuple[str, ...]
    layers: dict[str, tuple[str, ...]]
    outside: tuple[str, ...]
    routed: frozenset[str]
    embeddings: tuple[str, ...] = ()

    @property
    def all_layers(self) -> list[str]:
        """Every linear layer of the model, block by block, then those outside."""
        return [name for block in self.blocks for name in self.layers[block]] + list(self.outside)

    @property
    def quantizable(self) -> list[str]:
        """Everything that a recipe can name: linear layers and embeddings."""
        return [*self.all_layers, *self.embeddings]

    def place_of(self, parameter: str) -> str:
        """The block that a parameter or module belongs to, or ``OUTSIDE``."""
        return self.block_of(parameter) or OUTSIDE

    @cached_property
    def _lists(self) -> frozenset[str]:
        """The lists that the blocks are in: asked for with every parameter, at every block."""
        return frozenset(block.rpartition(".")[0] for block in self.blocks)

    def block_of(self, parameter: str) -> str | None:
        """The block that a parameter or module belongs to, or None."""
        for list_name in self._lists:
            if parameter.startswith(list_name + "."):
                index = parameter[len(list_name) + 1 :].partition(".")[0]
                block = f"{list_name}.{index}"
                return block if block in self.layers else None
        return None


def describe(model: nn.Module) -> Architecture:
    """Find the parts of a model (on any device, meta included).

    Raises:
        PreflightError: the model has no list of blocks.
    """
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    blocks: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(block + ".") for block in blocks):
            continue
        # A list in a list is never called itself; the search goes on inside.
        items = [f"{name}.{index}" for index, item in enumerate(module) if not isinstance(item, nn.ModuleList)]
        with_layers = [item for item in items if any(layer.startswith(item + ".") for layer in linear)]
        blocks += with_layers
    if not blocks:
        raise PreflightError(
            f"{type(model).__name__} has no list of blocks with linear layers in it: quantlab works block by block, "
            "and finds the blocks as the items of an nn.ModuleList"
        )
    layers = {block: tuple(name for name in linear if name.startswith(block + ".")) for block in blocks}
    inside = {name for names in layers.values() for name in names}
    experts = [name for name, module in model.named_modules() if isinstance(module, UnfusedExperts)]
    routed = frozenset(name for name in inside if any(name.startswith(expert + ".") for expert in experts))
    embeddings = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Embedding and not any(name.startswith(block + ".") for block in blocks)
    ]
    outside = tuple(name for name in linear if name not in inside)
    return Architecture(tuple(blocks), layers, outside, routed, tuple(embeddings))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer: ``nn.Linear`` itself, or GPT-2's transposed ``Conv1D``."""
    kind = type(module)
    plain = kind is nn.Linear or f"{kind.__module__}.{kind.__qualname__}" in _PLAIN_SUBCLASSES
    return plain or isinstance(module, Conv1D)


def features(module: nn.Module) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear layer."""
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def get_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a linear layer as ``[out, in]``: a view."""
    weight = module.get_parameter("weight").data
    return weight.T if isinstance(module, Conv1D) else weight


def set_weight(module: nn.Module, weight: torch.Tensor) -> None:
    """Replace the weight of a linear layer by ``weight [out, in]``, in the layer's own dtype."""
    own = weight.T if isinstance(module, Conv1D) else weight
    module.weight = nn.Parameter(own.to(get_weight(module).dtype).contiguous(), requires_grad=False)


def add_to_bias(module: nn.Module, shift: torch.Tensor) -> None:
    """Add ``shift [out]`` to the bias of a linear layer; a layer without one gets one."""
    bias = shift if module.bias is None else module.get_parameter("bias").float() + shift
    module.bias = nn.Parameter(bias.to(get_weight(module).dtype), requires_grad=False)


def replace_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put ``tensor`` in the place of the parameter or buffer called ``name``."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
