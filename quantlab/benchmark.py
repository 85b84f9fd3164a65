"""How fast models are and what memory they take, quantized or not, measured together."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from quantlab_evals import (
    LoadCost,
    Speed,
    SpeedComparison,
    SpeedSettings,
    Timing,
    layer_timings,
    load_cost,
    measure_speed,
    stream_bandwidth,
)
from quantlab_kernels import Choice, choose
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from quantlab.checkpoint.load import load
from quantlab.checkpoint.resolve import resolve
from quantlab.checkpoint.weights import WeightFiles
from quantlab.engine.architecture import features, is_linear
from quantlab.errors import CheckpointError, QuantlabError
from quantlab.nn import QuantLinear

Progress = Callable[[int, int, str], None]
"""Called with the steps done, the steps in all of this stage, and what is being done."""

_LOAD = "quantlab.checkpoint.load:load"


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
class BenchedModel:
    """Everything that was measured of one model.

    Attributes:
        speed: reading prompts and decoding.
        bytes: of its weight files.
        loading: seconds and memory of a process that loads and runs it; None where that was not asked for.
        layers: its kinds of layers, by batch size and name; empty where that was not asked for.
    """

    speed: Speed
    bytes: int
    loading: LoadCost | None
    layers: tuple[LayerSpeed, ...]

    @property
    def name(self) -> str:
        """What it was called."""
        return self.speed.name

    def to_dict(self) -> dict[str, Any]:
        """A JSON mapping."""
        return {
            **self.speed.to_dict(),
            "bytes": self.bytes,
            "loading": None if self.loading is None else asdict(self.loading),
            "layers": [layer.to_dict() for layer in self.layers],
        }


@dataclass(frozen=True)
class Bench:
    """Models that were measured in turns.

    Attributes:
        comparison: the settings, the machine and the models' speed.
        models: in the order in which they were named; what they are compared with comes last.
        against: the name of what they are compared with, or None.
        stream_bandwidth: bytes a second at which this run read memory.
        seconds: that everything took.
    """

    comparison: SpeedComparison
    models: tuple[BenchedModel, ...]
    against: str | None
    stream_bandwidth: float
    seconds: float

    def ratio(self, model: str, batch: int, what: str = "step") -> float | None:
        """How many times faster a model is than what it is compared with: the median over rounds of its ratio.

        Args:
            model: its name.
            batch: prompts at once.
            what: ``step`` or ``prefill``; each model in the way of decoding that is the faster one for it.
        """
        if self.against is None:
            return None
        runs = {speed.name: speed.best(batch) for speed in self.comparison.models}
        pairs = zip(getattr(runs[self.against], what).wall, getattr(runs[model], what).wall, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    def to_dict(self) -> dict[str, Any]:
        """A JSON mapping."""
        document: dict[str, Any] = self.comparison.to_dict()
        document["models"] = [self._with_ratios(model) for model in self.models]
        rest = {"against": self.against, "stream_bandwidth": self.stream_bandwidth, "seconds": self.seconds}
        return {**document, **rest}

    def _with_ratios(self, model: BenchedModel) -> dict[str, Any]:
        batches = self.comparison.settings.batches
        ratios = {
            str(batch): {what: self.ratio(model.name, batch, what) for what in ("prefill", "step")} for batch in batches
        }
        return {**model.to_dict(), "times_faster": ratios if self.against else None}


def bench(
    models: Sequence[str | Path],
    *,
    against: str | Path | None = None,
    settings: SpeedSettings | None = None,
    memory: bool = True,
    layers: bool = True,
    progress: Progress | None = None,
) -> Bench:
    """Measure models in turns: speed of prompts and of decoding, kernels layer by layer, memory and time of loading.

    All models are in memory at once. Loading is measured last, in a process for each, when their files have been read.

    Args:
        models: folders, quantized or not, ``.gguf`` files, Hugging Face ids, ``demo``.
        against: what to compare with: usually the model that they were made from.
        settings: of the measurement of speed.
        memory: whether to measure loading.
        layers: whether to measure each kind of layer alone.
        progress: told what is being done.

    Raises:
        QuantlabError: there is no such model, or the same one twice.
        EvalError: a setting cannot be, or a model cannot decode.
    """
    settings = settings or SpeedSettings()
    started = time.perf_counter()
    folders = _folders([*models, *([] if against is None else [against])])
    tell = progress or (lambda *_: None)
    loaded = {}
    for place, (name, folder) in enumerate(folders.items()):
        tell(place, len(folders), f"load {name}")
        loaded[name] = load(folder)
    bandwidth = stream_bandwidth()
    comparison = measure_speed(loaded, settings, progress=tell)
    kinds = _layer_speeds(loaded, settings, bandwidth, tell) if layers else dict.fromkeys(folders, ())
    threads = comparison.machine.threads
    benched = []
    for place, (speed, folder) in enumerate(zip(comparison.models, folders.values(), strict=True)):
        cost = None
        if memory:
            tell(place, len(folders), f"load {speed.name} in a process of its own")
            cost = load_cost(_LOAD, str(folder), threads=threads, prompt_tokens=settings.prompt_tokens)
        size = sum(file.stat().st_size for file in WeightFiles(folder).files)
        benched.append(BenchedModel(speed, size, cost, kinds[speed.name]))
    named = None if against is None else str(against)
    return Bench(comparison, tuple(benched), named, bandwidth, time.perf_counter() - started)


def _folders(models: Sequence[str | Path]) -> dict[str, Path]:
    """The folders of models by what they are called; every one can be read."""
    names = [str(model) for model in models]
    if not names:
        raise QuantlabError("there is no model to measure; name one")
    if again := next((name for name in names if names.count(name) > 1), None):
        raise QuantlabError(f"{again}: is named twice; a model is measured once, and --against adds the original")
    folders = {name: resolve(model) for name, model in zip(names, models, strict=True)}
    for name, folder in folders.items():
        try:
            AutoConfig.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{name}: its config.json cannot be read: {error}") from error
    return folders


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


def kernels(model: str | Path, rows: Sequence[int] = (1, 4, 16, 128)) -> tuple[ChosenKernel, ...]:
    """Which kernels the quantized layers of a model run on this machine. Nothing is measured.

    Args:
        model: what a person calls it.
        rows: of activations: a batch that decodes, or a prompt.

    Raises:
        QuantlabError: there is no such model, or none of its layers is quantized.
    """
    if not rows or any(type(count) is not int or count < 1 for count in rows):
        raise QuantlabError(f"rows {list(rows)!r}: use one or more whole numbers, each at least 1")
    loaded = load(model)
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


def _layer_speeds(
    models: dict[str, PreTrainedModel], settings: SpeedSettings, bandwidth: float, tell: Progress
) -> dict[str, tuple[LayerSpeed, ...]]:
    """Each model's kinds of layers with each batch size, all models in turns."""
    asked: dict[str, tuple[str, LayerSpeed]] = {}
    calls: dict[str, tuple[Sequence[nn.Module], torch.Tensor]] = {}
    generator = torch.Generator().manual_seed(settings.seed)
    empty = Timing((), ())
    for rows in settings.batches:
        for name, model in models.items():
            for kind, alike in _kinds(model).items():
                x = torch.randn(rows, kind.shape[1], generator=generator).to(model.device, model.dtype)
                key = str(len(calls))
                calls[key] = alike, x
                found = LayerSpeed(kind.layer, kind.format, kind.shape, len(alike), rows, kind.bytes, empty, bandwidth)
                asked[key] = name, found
    timings = layer_timings(calls, progress=lambda done, total: tell(done, total, "layers"))
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
    return choose(x, layer.codes, scales, layer.zeros, layer.table, layer.bits, low_rank)


def _kinds(model: nn.Module) -> dict[_Kind, list[nn.Module]]:
    """Linear layers that are alike, by the names that they have in common."""
    kinds: dict[_Kind, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            storage = module.storage
            shape = (storage.out_features, storage.in_features)
            groups = storage.scale_shape[1]
            form = f"{storage.format}/{'channel' if groups == 1 else storage.in_features // groups}"
        elif is_linear(module):
            shape, form = features(module), str(module.get_parameter("weight").dtype).removeprefix("torch.")
        else:
            continue
        size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
        folded = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        kinds.setdefault(_Kind(folded, form, shape, size), []).append(module)
    return kinds
