"""How fast models are and what memory they take, quantized or not, measured together."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from quantlab_evals import (
    LoadCost,
    Speed,
    SpeedComparison,
    SpeedSettings,
    load_cost,
    measure_speed,
    stream_bandwidth,
)
from quantlab_evals.logits import input_device

from quantlab.engine.device import Placement, enough_memory
from quantlab.errors import QuantlabError
from quantlab.evaluation.subject import Device, Subject, check_room, placed
from quantlab.layer_speed import LayerSpeed, layer_speeds

Progress = Callable[[int, int, str], None]
"""Called with the steps done, the steps in all of this stage, and what is being done."""

LOAD = "quantlab.evaluation.subject:load_named"
"""What loads a model by its name in a process of its own."""


@dataclass(frozen=True)
class BenchedModel:
    """Everything that was measured of one model.

    Attributes:
        speed: reading prompts and decoding.
        bytes: of its weight files, or of its tensors where another tool made it in memory.
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
    device: Device = None,
    progress: Progress | None = None,
) -> Bench:
    """Measure models in turns: speed of prompts and of decoding, kernels layer by layer, memory and time of loading.

    All models are in memory at once. Loading is measured last, in a process for each, when their files have been read.

    Args:
        models: folders, quantized or not, ``.gguf`` files, Hugging Face ids, ``demo``, ``TOOL:KIND:MODEL``.
        against: what to compare with: usually the model that they were made from.
        settings: of the measurement of speed.
        memory: whether to measure loading.
        layers: whether to measure each kind of layer alone.
        device: where models run: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: on the GPUs, and what has no room there in
            memory or on disk; such a model is not compiled. None: the CPU.
        progress: told what is being done.

    Raises:
        QuantlabError: there is no such model or device, or the same model twice; memory does not suffice.
        EvalError: a setting cannot be, or a model cannot decode.
    """
    settings = settings or SpeedSettings()
    started = time.perf_counter()
    placement = placed(device)
    subjects = _subjects([*models, *([] if against is None else [against])], placement)
    check_room(subjects.values())
    tell = progress or (lambda *_: None)
    with enough_memory():
        comparison, bandwidth, kinds, sizes = _measured(subjects, settings, layers, tell)
    gc.collect()
    torch.cuda.empty_cache()  # what this process keeps of a GPU, the next one does not get
    threads = comparison.machine.threads
    benched = []
    for place, speed in enumerate(comparison.models):
        cost = None
        if memory:
            tell(place, len(subjects), f"load {speed.name} in a process of its own")
            cost = loading(speed.name, device, threads=threads, prompt_tokens=settings.prompt_tokens)
        benched.append(BenchedModel(speed, sizes[speed.name], cost, kinds[speed.name]))
    named = None if against is None else str(against)
    return Bench(comparison, tuple(benched), named, bandwidth, time.perf_counter() - started)


def loading(model: str, device: Device, *, threads: int, prompt_tokens: int) -> LoadCost:
    """What it takes to load a model onto a device, and to run it there, in a process of its own."""
    options = {} if device is None else {"device": str(device)}
    return load_cost(LOAD, model, options=options, threads=threads, prompt_tokens=prompt_tokens)


def _measured(
    subjects: Mapping[str, Subject], settings: SpeedSettings, layers: bool, tell: Progress
) -> tuple[SpeedComparison, float, dict[str, tuple[LayerSpeed, ...]], dict[str, int]]:
    """Of models that are in memory together: speed, the bandwidth of memory, layers and bytes."""
    loaded = {}
    for place, (name, subject) in enumerate(subjects.items()):
        tell(place, len(subjects), f"load {name}")
        loaded[name] = subject.loaded()
    bandwidth = stream_bandwidth(device=input_device(next(iter(loaded.values()))))
    comparison = measure_speed(loaded, settings, progress=tell)
    kinds: dict[str, tuple[LayerSpeed, ...]] = dict.fromkeys(subjects, ())
    if layers:
        kinds = layer_speeds(loaded, settings, bandwidth, lambda done, total: tell(done, total, "layers"))
    sizes = {name: subject.bytes(loaded[name]) for name, subject in subjects.items()}
    return comparison, bandwidth, kinds, sizes


def _subjects(models: Sequence[str | Path], placement: Placement | None) -> dict[str, Subject]:
    """Models by what they are called; the configuration of every one can be read."""
    names = [str(model) for model in models]
    if not names:
        raise QuantlabError("there is no model to measure; name one")
    if again := next((name for name in names if names.count(name) > 1), None):
        raise QuantlabError(f"{again}: is named twice; a model is measured once, and --against adds the original")
    return {name: Subject.of(name, placement) for name in names}
