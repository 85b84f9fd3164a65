"""A model's kinds of layers, each alone: how fast it is, and which kernel runs it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from quantlab_evals import SpeedSettings, Timing, layer_timings
from quantlab_evals.logits import input_device
from quantlab_kernels import Choice, choose
from torch import nn
from transformers import PreTrainedModel

from quantlab.checkpoint.load import load
from quantlab.engine.architecture import features, is_linear
from quantlab.engine.device import choose_placement, enough_memory
from quantlab.errors import QuantlabError
from quantlab.nn import QuantLinear


@dataclass(frozen=True)
class LayerSpeed:
    """One kind of layer, called alone.

    Attributes:
        layer: its name, with a star for numbers: ``model.layers.*.mlp.down_proj``.
        format: of its weight: a grid and what shares a scale, or a dtype.
        shape: ``(out_features, in_features)``.
        count: how many the model has.
        rows: of the activations.
        bytes: that are stored for one of them.
        timing: of one call, with weights that come from memory.
        stream_bandwidth: bytes a second at which memory was read in the same run.
    """

    layer: str
    format: str
    shape: tuple[int, int]
    count: int
    rows: int
    bytes: int
    timing: Timing
    stream_bandwidth: float

    @property
    def bandwidth(self) -> float:
        """Bytes of weights that went through a call in a second, at the median."""
        return self.bytes / self.timing.median

    @property
    def share(self) -> float:
        """The bandwidth as a share of that of reading memory: 1 is the most that one row can have."""
        return self.bandwidth / self.stream_bandwidth

    def to_dict(self) -> dict[str, Any]:
        """A JSON mapping."""
        plain = {key: getattr(self, key) for key in ("layer", "format", "shape", "count", "rows", "bytes")}
        return {**plain, "bandwidth": self.bandwidth, "share": self.share, "seconds": self.timing.to_dict()}


@dataclass(frozen=True)
class ChosenKernel:
    """Which kernel a kind of layer runs with so many rows.

    Attributes:
        layer: its name, with a star for numbers.
        format: of its weight: a grid and what shares a scale.
        shape: ``(out_features, in_features)``.
        count: how many the model has.
        rows: of the activations.
        kernel: the dispatcher's answer, with its reason where it is not the best kernel of the machine.
    """

    layer: str
    format: str
    shape: tuple[int, int]
    count: int
    rows: int
    kernel: str


def kernels(
    model: str | Path, rows: Sequence[int] = (1, 4, 16, 128), device: str | torch.device = "cpu"
) -> tuple[ChosenKernel, ...]:
    """Which kernels the quantized layers of a model run on this machine. Nothing is measured.

    Args:
        model: what a person calls it.
        rows: of activations: a batch that decodes, or a prompt.
        device: where it runs.

    Raises:
        QuantlabError: there is no such model or device, or none of its layers is quantized.
    """
    if not rows or any(type(count) is not int or count < 1 for count in rows):
        raise QuantlabError(f"rows {list(rows)!r}: use one or more whole numbers, each at least 1")
    with enough_memory():
        loaded = load(model, **choose_placement(device).loading)
    found = []
    for kind, alike in _kinds(loaded).items():
        layer = alike[0]
        if isinstance(layer, QuantLinear):
            for count in rows:
                x = torch.empty(count, kind.shape[1], dtype=loaded.dtype, device=layer.codes.device)
                kernel = str(_choice(layer, x))
                found.append(ChosenKernel(kind.layer, kind.format, kind.shape, len(alike), count, kernel))
    if not found:
        raise QuantlabError(f"{model}: none of its linear layers is quantized; torch's own kernels run them")
    return tuple(found)


@dataclass(frozen=True)
class _Kind:
    """Layers that are alike."""

    layer: str
    format: str
    shape: tuple[int, int]
    bytes: int


def layer_speeds(
    models: Mapping[str, PreTrainedModel],
    settings: SpeedSettings,
    bandwidth: float,
    progress: Callable[[int, int], None],
) -> dict[str, tuple[LayerSpeed, ...]]:
    """Each model's kinds of layers with as many rows as each batch has prompts, all models in turns.

    Args:
        models: by name.
        settings: their batches and seed are used.
        bandwidth: bytes a second at which memory is read.
        progress: told after each round.
    """
    asked: dict[str, tuple[str, LayerSpeed]] = {}
    calls: dict[str, tuple[Sequence[nn.Module], torch.Tensor]] = {}
    generator = torch.Generator().manual_seed(settings.seed)
    empty = Timing((), ())
    for rows in settings.batches:
        for name, model in models.items():
            for kind, alike in _kinds(model).items():
                x = torch.randn(rows, kind.shape[1], generator=generator).to(input_device(model), model.dtype)
                key = str(len(calls))
                calls[key] = alike, x
                found = LayerSpeed(kind.layer, kind.format, kind.shape, len(alike), rows, kind.bytes, empty, bandwidth)
                asked[key] = name, found
    timings = layer_timings(calls, progress=progress)
    result: dict[str, list[LayerSpeed]] = {name: [] for name in models}
    for key, (name, found) in asked.items():
        result[name].append(replace(found, timing=timings[key]))
    return {name: tuple(found) for name, found in result.items()}


def _choice(layer: QuantLinear, x: torch.Tensor) -> Choice:
    low_rank = None
    if layer.low_rank_left is not None and layer.low_rank_right is not None:
        low_rank = layer.low_rank_left, layer.low_rank_right
    # Scales of two levels reach a kernel decoded.
    scales = layer.scales if layer.outer_scales is None else layer.scales.float()
    return choose(x, layer.codes, scales, layer.zeros, layer.table, layer.bits, low_rank, layer.activations)


def _kinds(model: nn.Module) -> dict[_Kind, list[nn.Module]]:
    """Linear layers that are alike, by the names that they have in common."""
    kinds: dict[_Kind, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            storage = module.storage
            shape = (storage.out_features, storage.in_features)
            groups = storage.scale_shape[1]
            form = f"{storage.format}/{'channel' if groups == 1 else storage.in_features // groups}"
            form += f" x {module.activations}" if module.activations else ""
        elif is_linear(module):
            shape, form = features(module), str(module.get_parameter("weight").dtype).removeprefix("torch.")
        else:
            continue
        size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
        folded = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        kinds.setdefault(_Kind(folded, form, shape, size), []).append(module)
    return kinds
