"""What a model weighs, reads and computes, as it is and as a recipe would make it: from its config alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from quantlab.checkpoint.placement import selected
from quantlab.checkpoint.skeleton import auto_dtype, empty_model, model_class, read_config
from quantlab.engine.architecture import describe, features
from quantlab.engine.footprint import planned_storage, stored_bytes
from quantlab.engine.preflight import plan
from quantlab.errors import QuantlabError
from quantlab.experts import unfuse_experts
from quantlab.recipe import Recipe

ORIGINAL = "original"
"""What a model without a recipe is called."""


@dataclass(frozen=True)
class Attention:
    """One layer's attention.

    Attributes:
        width: of its queries, all heads together.
        kept: numbers that it keeps of a token: keys and values of every head that has its own.
        window: tokens that it sees at most, or None: all.
    """

    width: int
    kept: int
    window: int | None = None

    def seen(self, tokens: int) -> int:
        """Tokens that the last of so many sees."""
        return tokens if self.window is None else min(tokens, self.window)

    def pairs(self, tokens: int) -> float:
        """Pairs of a query and a key in a prompt of so many tokens."""
        seen = self.seen(tokens)
        return seen * seen / 2 + (tokens - seen) * seen


@dataclass(frozen=True)
class Shape:
    """What a model weighs and computes.

    Attributes:
        name: ``original``, or the recipe's.
        bytes: of everything that is stored, embeddings included.
        dense_bytes: that every token reads: linear layers, norms; of embeddings a head that is tied to them.
        dense_weights: of linear layers that every token goes through.
        routed_bytes: of all experts.
        routed_weights: of all experts.
        routed_share: of the experts that a token goes through.
        attention: of each layer that has one.
        kv_bits: of a number that attention keeps.
    """

    name: str
    bytes: float
    dense_bytes: float
    dense_weights: float
    attention: tuple[Attention, ...]
    kv_bits: float = 16
    routed_bytes: float = 0
    routed_weights: float = 0
    routed_share: float = 0

    def kv_bytes(self, tokens: int) -> float:
        """That are kept of a context."""
        return sum(layer.kept * layer.seen(tokens) for layer in self.attention) * self.kv_bits / 8

    def read_bytes(self, batch: int) -> float:
        """Weights that one step reads; experts are expected to be drawn evenly and independently."""
        return self.dense_bytes + self.routed_bytes * (1 - (1 - self.routed_share) ** batch)

    @property
    def active_weights(self) -> float:
        """That one token goes through."""
        return self.dense_weights + self.routed_share * self.routed_weights

    def prefill_flops(self, tokens: int) -> float:
        """Operations of reading a prompt: two a weight and token, and four a pair and number of its query's width."""
        attention = sum(4 * layer.width * layer.pairs(tokens) for layer in self.attention)
        return 2 * self.active_weights * tokens + attention

    def step_flops(self, context: int) -> float:
        """Operations of one more token after so many."""
        return 2 * self.active_weights + sum(4 * layer.width * layer.seen(context) for layer in self.attention)


def model_shapes(folder: Path, recipe: Recipe | None) -> tuple[Shape, ...]:
    """A model as it is and, with a recipe, as that would make it; from ``config.json`` alone.

    Raises:
        QuantlabError: no config, a recipe that does not fit, an attention whose cache is not one of keys and values.
    """
    config = read_config(folder)
    dtype = auto_dtype(config, [torch.bfloat16])
    model = empty_model(model_class(config, folder), config, dtype)
    unfuse_experts(model)
    attention = _attention(config, folder)
    original = _shape(model, config, ORIGINAL, {}, attention, dtype)
    if recipe is None:
        return (original,)
    planned = plan(recipe, describe(model), model)
    sizes = {name: stored_bytes(planned_storage(layer)) for name, layer in planned.items()}
    return original, _shape(model, config, recipe.name, sizes, attention, dtype)


def _shape(
    model: nn.Module,
    config: PretrainedConfig,
    name: str,
    sizes: dict[str, int],
    attention: tuple[Attention, ...],
    dtype: torch.dtype,
) -> Shape:
    """Add up what is stored and what is read; ``sizes`` are bytes of the layers that are quantized."""
    architecture = describe(model)
    linear = {layer: features(model.get_submodule(layer)) for layer in architecture.all_layers}
    read = {layer: sizes.get(layer, math.prod(shape) * dtype.itemsize) for layer, shape in linear.items()}
    stored, rest = float(sum(sizes.values())), 0.0
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for tensor, places in selected(model):
        owners = {full.rpartition(".")[0] for _, leaf, full in places if leaf == "weight"}
        size = tensor.numel() * tensor.element_size()
        if not owners or not owners <= set(sizes):
            stored += size
        if not owners & set(linear) and id(tensor) not in embedded:
            rest += size
    routed = architecture.routed
    return Shape(
        name=name,
        bytes=stored,
        dense_bytes=rest + sum(size for layer, size in read.items() if layer not in routed),
        dense_weights=sum(math.prod(shape) for layer, shape in linear.items() if layer not in routed),
        attention=attention,
        kv_bits=8 * dtype.itemsize,
        routed_bytes=sum(read[layer] for layer in routed),
        routed_weights=sum(math.prod(linear[layer]) for layer in routed),
        routed_share=routed_share(config) if routed else 0.0,
    )


def routed_share(config: PretrainedConfig) -> float:
    """Of the experts of a mixture, the share that a token goes through.

    Raises:
        QuantlabError: the config does not say.
    """
    text = config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    total = next((value for name in names if (value := getattr(text, name, None))), None)
    if not chosen or not total:
        raise QuantlabError(
            f"{type(config).__name__} does not say how many of its experts a token goes through "
            "(num_experts_per_tok of num_experts): its speed cannot be predicted"
        )
    return chosen / total


def _attention(config: PretrainedConfig, folder: Path) -> tuple[Attention, ...]:
    """What transformers' cache would keep, layer by layer."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    layers = DynamicCache(config=config).layers
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    if not plain or not layers or not isinstance(heads, int) or getattr(text, "kv_lora_rank", None):
        raise QuantlabError(
            f"{folder}: {type(config).__name__} keeps something else of a context than keys and values of its heads "
            "(a recurrent state, or a compressed form): its cache cannot be predicted"
        )
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    shared = getattr(text, "num_key_value_heads", None) or heads
    windows = [getattr(layer, "sliding_window", None) for layer in layers]
    return tuple(Attention(heads * width, 2 * shared * width, window) for window in windows)
