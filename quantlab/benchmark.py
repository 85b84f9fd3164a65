"""How fast models are and what memory they take, quantized or not, measured together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantlab_evals import (
    LoadCost,
    Speed,
    SpeedComparison,
    SpeedSettings,
    load_cost,
    measure_speed,
    stream_bandwidth,
)

from quantlab.errors import QuantlabError
from quantlab.evaluation.subject import Subject
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
        progress: told what is being done.

    Raises:
        QuantlabError: there is no such model, or the same one twice.
        EvalError: a setting cannot be, or a model cannot decode.
    """
    settings = settings or SpeedSettings()
    started = time.perf_counter()
    subjects = _subjects([*models, *([] if against is None else [against])])
    tell = progress or (lambda *_: None)
    loaded = {}
    for place, (name, subject) in enumerate(subjects.items()):
        tell(place, len(subjects), f"load {name}")
        loaded[name] = subject.loaded()
    bandwidth = stream_bandwidth()
    comparison = measure_speed(loaded, settings, progress=tell)
    kinds: dict[str, tuple[LayerSpeed, ...]] = dict.fromkeys(subjects, ())
    if layers:
        kinds = layer_speeds(loaded, settings, bandwidth, lambda done, total: tell(done, total, "layers"))
    threads = comparison.machine.threads
    benched = []
    for place, (speed, subject) in enumerate(zip(comparison.models, subjects.values(), strict=True)):
        cost = None
        if memory:
            tell(place, len(subjects), f"load {speed.name} in a process of its own")
            cost = load_cost(LOAD, speed.name, threads=threads, prompt_tokens=settings.prompt_tokens)
        benched.append(BenchedModel(speed, subject.bytes(loaded[speed.name]), cost, kinds[speed.name]))
    named = None if against is None else str(against)
    return Bench(comparison, tuple(benched), named, bandwidth, time.perf_counter() - started)


def _subjects(models: Sequence[str | Path]) -> dict[str, Subject]:
    """Models by what they are called; the configuration of every one can be read."""
    names = [str(model) for model in models]
    if not names:
        raise QuantlabError("there is no model to measure; name one")
    if again := next((name for name in names if names.count(name) > 1), None):
        raise QuantlabError(f"{again}: is named twice; a model is measured once, and --against adds the original")
    return {name: Subject.of(name) for name in names}
