"""A copy of a block to try things out on: small random weights, and one expert in the place of all of a mixture.

What holds for random weights holds for all, and nothing is too large or too small in them to be seen.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from quantlab.engine.architecture import is_linear
from quantlab.engine.forward import Call
from quantlab.engine.hooks import hooked
from quantlab.experts import UnfusedExperts


@dataclass(eq=False)
class Trial:
    """A block that can be run by itself, in float32.

    Attributes:
        block: the copy. All experts of a mixture share the weights of the first.
        call: the arguments of a call of the block; its first is random too.
        readers: modules whose input is recorded, by name: linear layers, whatever else has a matrix (routers), and
            mixtures as a whole, which stand for the first layers of all their experts. What an expert's second layer
            is given is recorded under the first expert's name, expert after expert.
        device: where it is: that of the call's first tensor.
        order: the modules in the order in which they are called, by name.
    """

    block: nn.Module
    call: Call
    readers: dict[str, nn.Module]
    device: torch.device
    order: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, block: nn.Module, call: Call) -> Trial:
        """Copy a block, on any device, and a call of it."""
        generator = torch.Generator().manual_seed(0)
        leaves = tree_leaves((call.args, call.kwargs))
        device = next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)), torch.device("cpu"))
        trial = _with_random_weights(block, generator, device)
        args, kwargs = tree_map(lambda leaf: _float(leaf), (call.args, call.kwargs))
        if args:
            args = (_random_like(args[0], generator), *args[1:])
        else:
            first = next(iter(kwargs))
            kwargs = {**kwargs, first: _random_like(kwargs[first], generator)}
        return cls(trial, Call(args, kwargs), _readers(trial), device)

    def run(self) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """The tensors that the block returns, and what each reader was given, ``[tokens, in]``."""
        inputs: dict[str, list[torch.Tensor]] = {}
        order: list[str] = []
        with hooked(
            module.register_forward_pre_hook(_recorder(canonical, inputs, order), with_kwargs=True)
            for name, module in self.block.named_modules()
            if (canonical := _canonical(self.block, name)) in self.readers or not list(module.children())
        ):
            call = copy.deepcopy(self.call)  # a cache among the arguments remembers
            returned = self.block(*call.args, **call.kwargs)
        self.order = list(dict.fromkeys(order))
        outputs = [leaf for leaf in tree_leaves(returned) if _is_float(leaf)]
        return outputs, {name: torch.cat(parts) for name, parts in inputs.items() if name in self.readers}


def distance(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """How far two outputs of a block are from each other."""
    return math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(some, others, strict=True)))


def first_layers(experts: UnfusedExperts) -> list[str]:
    """The layers of a mixture that read its input, by their names in it."""
    return [f"{e}.{experts._up_name}" for e in range(experts.num_experts)]


def _recorder(
    name: str, inputs: dict[str, list[torch.Tensor]], order: list[str]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        order.append(name)
        if x is not None and _is_float(x):
            inputs.setdefault(name, []).append(x.reshape(-1, x.shape[-1]).clone())

    return record


def _canonical(block: nn.Module, name: str) -> str:
    """The name itself, but of an expert's modules those of the first."""
    parts = name.split(".")
    for cut in [i for i, part in enumerate(parts) if part.isdigit()]:
        if isinstance(block.get_submodule(".".join(parts[:cut])), UnfusedExperts):
            return ".".join([*parts[:cut], "0", *parts[cut + 1 :]])
    return name


def _readers(block: nn.Module) -> dict[str, nn.Module]:
    mixtures = {name: module for name, module in block.named_modules() if isinstance(module, UnfusedExperts)}
    first = {f"{name}.{layer}" for name, experts in mixtures.items() for layer in first_layers(experts)}
    return mixtures | {
        name: module
        for name, module in block.named_modules()
        if _has_matrix(module) and name not in first and _canonical(block, name) == name
    }


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return is_linear(module) or (weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding))


def _with_random_weights(block: nn.Module, generator: torch.Generator, device: torch.device) -> nn.Module:
    memo: dict[int, Any] = {}  # what deepcopy takes instead of copying a tensor
    first: dict[str, nn.Parameter] = {}
    for name, parameter in block.named_parameters():
        canonical = _canonical(block, name)
        if canonical not in first:
            random = _random(parameter.shape, name, generator).to(device)
            first[canonical] = nn.Parameter(random, requires_grad=False)
        memo[id(parameter)] = first[canonical]
    return copy.deepcopy(block, memo).float().eval()


def _random(shape: torch.Size, name: str, generator: torch.Generator) -> torch.Tensor:
    """Products keep the size of what they multiply, gains are about one, and everything else is small."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return noise / math.sqrt(math.prod(shape[1:]) if len(shape) > 2 else max(shape))
    return 1 + 0.2 * noise if name.endswith("weight") else 0.1 * noise


def _float(leaf: Any) -> Any:
    return leaf.float() if _is_float(leaf) else leaf


def _random_like(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(x.shape, generator=generator).to(x.device) if _is_float(x) else x


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
