"""Speed and memory of a model on devices that are not here: the roofline, from its config and a recipe alone.

A device can do so many operations and read so many bytes a second; whichever takes longer is the time that it cannot go
below. Everything here is such a bound, computed and not measured. Formulas: arXiv:2405.08944, sections 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from quantlab.checkpoint.placement import selected
from quantlab.checkpoint.resolve import resolve
from quantlab.checkpoint.skeleton import auto_dtype, empty_model, model_class, read_config
from quantlab.devices import Device, device_called
from quantlab.engine.architecture import describe, features
from quantlab.engine.footprint import planned_storage, stored_bytes
from quantlab.engine.preflight import plan
from quantlab.errors import QuantlabError
from quantlab.nn import unfuse_experts
from quantlab.recipe import Recipe, load_recipe

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


@dataclass(frozen=True)
class Prediction:
    """Bounds for one model on one device; a program is slower.

    Attributes:
        device: its name.
        model: ``original``, or the recipe's name.
        fits: whether weights and one context are smaller than the memory; the other figures do not ask.
        weight_bytes: in memory.
        kv_bytes: of one context.
        prefill_seconds: to read the prompt.
        step_seconds: to decode one token after it, alone.
        concurrency: contexts that are in memory at once.
        batch_tokens_per_second: of all of them together, when they decode at once; 0 if there is none.
        boundary_batch: how many tokens at once take as long to compute as the weights take to be read.
        switch_seconds: to send one context to the host's memory and fetch another; None on the host itself.
    """

    device: str
    model: str
    fits: bool
    weight_bytes: float
    kv_bytes: float
    prefill_seconds: float
    step_seconds: float
    concurrency: int
    batch_tokens_per_second: float
    boundary_batch: float
    switch_seconds: float | None

    @property
    def tokens_per_second(self) -> float:
        """One context, decoded alone."""
        return 1 / self.step_seconds


@dataclass(frozen=True)
class Roofline:
    """Predictions: ``predicted`` is always true, so that nobody takes the figures for measured ones.

    Attributes:
        model: what a person called it.
        tokens: of the context.
        devices: with the sources of their figures.
        shapes: the original's first.
        predictions: for each device, for each shape.
    """

    model: str
    tokens: int
    devices: tuple[Device, ...]
    shapes: tuple[Shape, ...]
    predictions: tuple[Prediction, ...]
    predicted: bool = field(default=True, init=False)

    def to_dict(self) -> dict[str, Any]:
        """A JSON mapping."""
        flat = asdict(self)
        for record, found in zip(flat["predictions"], self.predictions, strict=True):
            record["tokens_per_second"] = found.tokens_per_second
        for record, shape in zip(flat["shapes"], self.shapes, strict=True):
            kept = [layer for layer in shape.attention if layer.window is None]
            record["attention"] = {"layers": len(shape.attention), "without_window": len(kept)}
            record["kv_bytes_per_token"] = shape.kv_bytes(1)
        return flat


def predict(shape: Shape, device: Device, tokens: int) -> Prediction:
    """The roofline of a model on a device after a prompt of so many tokens."""
    context = shape.kv_bytes(tokens)
    concurrency = max(0, math.floor((device.memory - shape.bytes) / context)) if context else 0

    def step(batch: int) -> float:
        reading = (shape.read_bytes(batch) + batch * context) / device.bandwidth
        return max(reading, batch * shape.step_flops(tokens) / device.flops)

    return Prediction(
        device=device.name,
        model=shape.name,
        fits=shape.bytes + context <= device.memory,
        weight_bytes=shape.bytes,
        kv_bytes=context,
        prefill_seconds=max(shape.prefill_flops(tokens) / device.flops, shape.read_bytes(tokens) / device.bandwidth),
        step_seconds=step(1),
        concurrency=concurrency,
        batch_tokens_per_second=concurrency / step(concurrency) if concurrency else 0.0,
        boundary_batch=shape.read_bytes(1) / device.bandwidth * device.flops / (2 * shape.active_weights),
        switch_seconds=2 * context / device.link if device.link else None,
    )


def roofline(
    model: str | Path,
    recipe: str | Path | Recipe | None = None,
    devices: str | Device | Sequence[str | Device] = ("h100", "a100", "rtx4090", "cpu"),
    *,
    tokens: int = 4096,
    kv_bits: float | None = None,
    overrides: Iterable[str] = (),
) -> Roofline:
    """Predict latency and memory of a model as it is, and as a recipe would make it. Nothing is loaded or run.

    Args:
        model: a folder (its ``config.json`` is enough), a ``.gguf`` file, a Hugging Face id, or ``demo``.
        recipe: a ready recipe, a file, or a recipe; None: the original alone.
        devices: names, see :func:`quantlab.devices.device_called`; ``cpu`` is measured.
        tokens: of the context.
        kv_bits: of a number in the cache of keys and values; None: as many as the model's dtype has.
        overrides: changes of the recipe, ``key=value``.

    Raises:
        QuantlabError: no such model, recipe or device; a recipe that does not fit; an attention whose cache is not
            one of keys and values.
    """
    if type(tokens) is not int or tokens < 1:
        raise QuantlabError(f"tokens {tokens!r}: use a whole number, at least 1")
    if kv_bits is not None and not 0 < kv_bits <= 32:
        raise QuantlabError(f"kv_bits {kv_bits!r}: use the bits of a number in the cache, above 0 and up to 32")
    listed = [devices] if isinstance(devices, str | Device) else list(devices)
    known = tuple(device if isinstance(device, Device) else device_called(device) for device in listed)
    if not known:
        raise QuantlabError("no device to predict for; name one, for example h100")
    if recipe is not None and not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    shapes = model_shapes(resolve(model), recipe)
    if kv_bits is not None:
        shapes = tuple(replace(shape, kv_bits=kv_bits) for shape in shapes)
    predictions = tuple(predict(shape, device, tokens) for device in known for shape in shapes)
    return Roofline(str(model), tokens, known, shapes, predictions)


def model_shapes(folder: Path, recipe: Recipe | None) -> tuple[Shape, ...]:
    """A model as it is and, with a recipe, as that would make it; from ``config.json`` alone.

    Raises:
        QuantlabError: see :func:`roofline`.
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
        routed_share=_routed_share(config) if routed else 0.0,
    )


def _routed_share(config: PretrainedConfig) -> float:
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
