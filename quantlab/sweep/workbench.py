"""One variant, from its recipe to its record; and what the variants of a sweep have in common.

The original's predictions on the evaluation windows, the windows, and the calibration sequences are made once. The
statistics of a layer's inputs are not shared: every variant takes its own, from layers that it has quantized itself.
"""

from __future__ import annotations

import gc
import shutil
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import gguf
import torch
import transformers
from quantlab_evals import PREDICTED, EvalError, SpeedSettings, check_length

from quantlab.benchmark import bench, loading
from quantlab.checkpoint.baseline import baseline_bits
from quantlab.checkpoint.resolve import source_of
from quantlab.devices import device_called
from quantlab.engine.calibration import CalibrationData, prepare
from quantlab.engine.device import choose_placement, enough_memory
from quantlab.engine.progress import Silent, Start
from quantlab.engine.quantize import quantize
from quantlab.errors import QuantlabError
from quantlab.evaluation.quality import Evaluator
from quantlab.evaluation.record import Evaluation
from quantlab.evaluation.subject import Subject
from quantlab.inspection import inspect
from quantlab.prediction import roofline
from quantlab.recipe import Calibration
from quantlab.sweep.space import Candidate

ORIGINALS = "original"
VARIANTS = "variants"


class Tell(Protocol):
    """Told what is being done with a variant."""

    def __call__(self, doing: str) -> None:
        """For example "quantize, block 3 of 30"."""


@dataclass(frozen=True)
class Setup:
    """What is the same for every variant of a sweep, and how it is measured.

    Attributes:
        model: what is quantized, as a person calls it.
        folder: of the sweep.
        text: to evaluate on, and `settings` of :func:`quantlab.evaluation.evaluate` for it.
        settings: see there.
        speed: how speed is measured; None: it is not.
        devices: that decoding is predicted for.
        device: where variants are quantized, evaluated and timed, see
            :func:`quantlab.engine.device.choose_placement`; quantizing takes one GPU.
        keep: whether quantized models stay on disk.
        threads: of torch; None: as many as it takes.
    """

    model: str = ""
    folder: Path = Path()
    text: str = "builtin:eval"
    settings: Mapping[str, Any] = field(default_factory=dict)
    speed: SpeedSettings | None = None
    devices: tuple[str, ...] = ()
    keep: bool = False
    threads: int | None = None
    device: str = "cpu"


class Workbench:
    """Makes and measures variants, one after another, in one process."""

    def __init__(self, setup: Setup, tell: Tell = lambda doing: None) -> None:  # noqa: ARG005
        self.setup = setup
        if setup.threads is not None:
            torch.set_num_threads(setup.threads)
        self._placement = choose_placement(setup.device)
        self._drawn: dict[Calibration, CalibrationData] = {}
        self._evaluator = Evaluator(
            setup.text,
            cache=setup.folder / ORIGINALS,
            against=setup.model,
            placement=self._placement,
            progress=lambda done, total: tell(f"the original's predictions, window {done} of {total}"),
            **setup.settings,
        )

    def record(self, candidate: Candidate, key: str, tell: Tell) -> dict[str, Any]:
        """Make a variant and measure it. Whatever goes wrong is in the record, as ``error``."""
        started = time.perf_counter()
        about = {"variant": candidate.name, "kind": candidate.kind, "labels": candidate.labels()}
        if candidate.recipe is not None:
            about["recipe"] = candidate.recipe.to_dict()
        try:
            found = self._measured(candidate, key, tell)
        except Exception as error:  # libraries raise of every kind, and the other variants go on
            said = " ".join(str(error).split()) or "no further words"
            found = {"error": said, "error_kind": type(error).__name__}
            if not isinstance(error, QuantlabError | EvalError):
                found["traceback"] = traceback.format_exc()
        gc.collect()
        return {**about, **found, "seconds": time.perf_counter() - started}

    def _measured(self, candidate: Candidate, key: str, tell: Tell) -> dict[str, Any]:
        folder, made = None, {}
        if candidate.recipe is not None:
            folder = self.setup.folder / VARIANTS / f"{_file_name(candidate.name)}-{key[:8]}"
            made = self._quantized(candidate, folder, tell)
        name = str(folder or (f"{candidate.baseline}:{self.setup.model}" if candidate.baseline else self.setup.model))
        if candidate.baseline and candidate.baseline.endswith(".gguf"):
            name = candidate.baseline
        measures, evaluation = self._quality(name, candidate, tell)
        speed = self._speed(name, candidate, tell)
        predicted, notes = self._predicted(candidate)
        record = {
            "measures": {**measures, **made.pop("measures", {}), **speed.pop("measures", {}), **predicted},
            **made,
            **speed,
            "evaluation": {**evaluation.to_dict(), "model": candidate.name},
            "notes": [*evaluation.notes, *notes],
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "threads": torch.get_num_threads(),
            "device": evaluation.perplexity.settings["device"],
        }
        if folder is not None and not self.setup.keep:
            shutil.rmtree(folder)
        elif folder is not None:
            record["folder"] = str(folder)
        return record

    def _quantized(self, candidate: Candidate, folder: Path, tell: Tell) -> dict[str, Any]:
        """The quantized folder, made here if it is not there yet, and what its layers are like."""
        seconds = None
        if not folder.exists():
            recipe = candidate.recipe
            assert recipe is not None
            result = quantize(
                self.setup.model,
                recipe,
                folder,
                calibration=self._calibration(recipe.calibration),
                progress=_Blocks(tell),
                device=self._placement.device,
            )
            seconds = None if result.resumed_blocks else result.seconds
        found = inspect(folder)
        calibration = dict(found.run.get("calibration") or {})
        layers = [
            {"layer": layer.layer, "format": layer.format, "bits": layer.bits, "error": layer.error,
             "metric": layer.metric, "weights": layer.weights}
            for layer in found.layers
        ]  # fmt: skip
        measures = {"bits": found.bits, "quantize_seconds": seconds}
        return {"measures": measures, "layers": layers, "calibration": calibration}

    def _calibration(self, choice: Calibration) -> CalibrationData:
        """The calibration sequences, drawn once for all variants that have the same."""
        if choice not in self._drawn:
            source = source_of(self.setup.model)
            self._drawn[choice] = prepare(choice, source.tokenizer(), source.config)
        return self._drawn[choice]

    def _quality(self, name: str, candidate: Candidate, tell: Tell) -> tuple[dict[str, Any], Evaluation]:
        tell("load")
        subject = Subject.of(name, self._placement)
        with enough_memory():
            module = subject.loaded()
        bits = _bits(candidate, module) if candidate.recipe is None else None  # before it runs, which may repack it
        subject = replace(subject, module=module)

        def progress(done: int, total: int) -> None:
            tell(f"evaluate, window {done} of {total}")

        alone = candidate.kind == "original"
        found = (self._evaluator.measure_alone if alone else self._evaluator.measure)(subject, progress)
        measures: dict[str, Any] = {"ppl": found.perplexity.perplexity, "bytes": found.bytes / 1e6}
        measures["model_bits"] = 8 * found.bytes / self._weights
        if bits is not None:
            measures["bits"] = bits
        if (divergence := found.divergence) is not None:
            measures |= {
                "kl": divergence.kl,
                "kl_p99": divergence.kl_p99,
                "agreement": 100 * divergence.agreement,
                "flips": 100 * divergence.flips,
            }
        if (sure := found.calibration) is not None:
            measures |= {"ece": sure.ece[15], "ks": sure.ks_error, "brier": sure.brier}
        return measures, found

    def _speed(self, name: str, candidate: Candidate, tell: Tell) -> dict[str, Any]:
        settings = self.setup.speed
        if settings is None:
            return {}
        against = None if candidate.kind == "original" else self.setup.model

        def progress(done: int, total: int, what: str) -> None:
            tell(f"speed, {done + 1} of {total}: {what}")

        gc.collect()  # what was evaluated would be in the way
        device = self.setup.device
        found = bench(
            [name], against=against, settings=settings, memory=False, layers=False, device=device, progress=progress
        )
        tell("load in a process of its own")
        machine = found.comparison.machine
        cost = loading(name, device, threads=machine.threads, prompt_tokens=settings.prompt_tokens)
        ours = replace(found.models[0], loading=cost)
        batch = settings.batches[0]
        run = ours.speed.best(batch)
        measures = {
            "decode": run.decode_rate,
            "prefill": run.prefill_rate,
            "first_token": 1e3 * run.prefill.median,
            "times_faster": found.ratio(ours.name, batch),
            "memory": (cost.running.peak if cost.on_device is None else cost.on_device) / 1e6,
            "load_seconds": cost.seconds,
        }
        return {"measures": measures, "speed": {**ours.to_dict(), "machine": vars(machine)}}

    def _predicted(self, candidate: Candidate) -> tuple[dict[str, float], list[str]]:
        """Decoding on devices that are not here; nothing for what other tools made."""
        if candidate.baseline is not None or not self.setup.devices:
            return {}, []
        try:
            found = roofline(self.setup.model, candidate.recipe, self.setup.devices)
        except QuantlabError as error:
            return {}, [f"no prediction: {error}"]
        wanted = found.shapes[-1].name
        rates = {p.device: p.tokens_per_second for p in found.predictions if p.model == wanted}
        return {f"{PREDICTED}{device}": rate for device, rate in rates.items()}, []

    @cached_property
    def _weights(self) -> int:
        """How many weights the original has; what is tied counts once."""
        skeleton = source_of(self.setup.model).skeleton()
        return sum(parameter.numel() for parameter in skeleton.parameters())


class _Blocks(Silent):
    """Tells of the blocks of a run."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._total, self._done = tell, 0, 0

    def start(self, start: Start) -> None:
        self._total, self._done = len(start.architecture.blocks), 0

    def block(self, name: str) -> None:
        if name:
            self._done += 1
            self._tell(f"quantize, block {self._done} of {self._total}")


def _bits(candidate: Candidate, module: Any) -> float | None:
    """Bits a weight of the linear layers of what quantlab did not make."""
    if candidate.baseline is None:
        return 8.0 * module.dtype.itemsize
    if not candidate.baseline.endswith(".gguf"):
        return baseline_bits(module)
    tensors = gguf.GGUFReader(candidate.baseline).tensors
    inside = [tensor for tensor in tensors if tensor.name.startswith("blk.") and len(tensor.shape) > 1]
    return 8 * sum(t.n_bytes for t in inside) / sum(t.n_elements for t in inside)


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)[:60]


def check(setup: Setup) -> None:
    """Refuse, before any work, devices that are not there or not known, and prompts longer than the model reads.

    Raises:
        QuantlabError: names the device.
        EvalError: names the length.
    """
    choose_placement(setup.device)
    if setup.speed is not None:
        check_length(Subject.of(setup.model).config, setup.speed.prompt_tokens + setup.speed.new_tokens)
    for device in setup.devices:
        device_called(device)
