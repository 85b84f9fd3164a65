"""The main job: a checkpoint and a recipe in, a smaller checkpoint out."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from quantlab.checkpoint.native import quantization_config
from quantlab.checkpoint.on_device import DeviceSource
from quantlab.checkpoint.requantized import open_decoded, quant_method_of
from quantlab.checkpoint.resolve import resolve
from quantlab.checkpoint.source import ModelSource, ModuleSource, open_source, parameter_bytes
from quantlab.checkpoint.writer import weight_bytes
from quantlab.engine import preflight
from quantlab.engine.ahead import look_ahead
from quantlab.engine.architecture import OUTSIDE, Architecture, describe
from quantlab.engine.awq import Rescaling, draw_sample
from quantlab.engine.calibration import CalibrationData, CalibrationText, prepare
from quantlab.engine.device import choose_device, computing
from quantlab.engine.distributed import SharedJournal, joined
from quantlab.engine.estimate import Estimate, estimate, parse_bytes
from quantlab.engine.hadamard import rotate
from quantlab.engine.journal import LOG, Journal, partial_folder
from quantlab.engine.loop import Run
from quantlab.engine.needs import Needs
from quantlab.engine.progress import Progress, Silent, Start
from quantlab.engine.report import LayerReport
from quantlab.engine.solve import PlannedLayer
from quantlab.errors import PreflightError
from quantlab.recipe import Recipe, load_recipe
from quantlab.transforms import Awq, Hadamard, Transform, make_transform

RECIPE = "recipe.yaml"
# Tokens that go through the blocks where no layer wants to know its inputs and only a transform looks at some.
_FEW = 32


@dataclass(frozen=True)
class Result:
    """A quantized checkpoint.

    Attributes:
        folder: where it is.
        recipe: what was asked for.
        reports: one a layer, in the order in which they were done.
        calibration: how the calibration data came about; empty if none was needed.
        bytes: of the folder's weights.
        original_bytes: of the weights that it was made from.
        seconds: that this run took.
        resumed_blocks: blocks that an earlier, interrupted run had done.
    """

    folder: Path
    recipe: Recipe
    reports: tuple[LayerReport, ...]
    calibration: dict[str, Any]
    bytes: int
    original_bytes: int
    seconds: float
    resumed_blocks: int

    @property
    def bits(self) -> float:
        """Bits a weight over all quantized layers, everything stored counted."""
        weights = sum(report.shape[0] * report.shape[1] for report in self.reports)
        return 8 * sum(report.bytes for report in self.reports) / weights


def quantize(
    model: str | Path | PreTrainedModel,
    recipe: str | Path | Mapping[str, Any] | Recipe = "w4-gptq",
    out: str | Path = "quantized",
    *,
    overrides: Iterable[str] = (),
    calibration: CalibrationText | CalibrationData | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    restart: bool = False,
    overwrite: bool = False,
    requantize: bool = False,
    memory: int | str | None = None,
    device: str | torch.device = "cpu",
) -> Result:
    """Quantize a model by a recipe and write the result to a folder.

    Interrupted and called again with the same arguments it goes on at the next block, and ends with the same bytes. In
    processes that ``torchrun`` or ``accelerate launch`` started it shares the work with the others; the first writes.

    Args:
        model: a local folder, a ``.gguf`` file, a Hugging Face id, ``demo``, or a model in memory.
        recipe: a ready recipe's name, a YAML file, a mapping or a Recipe.
        out: the folder to write; it must not exist, unless ``overwrite``.
        overrides: ``key=value`` changes to the recipe.
        calibration: documents, token ids int64 ``[samples, length]``, or sequences that were drawn before, instead of
            the recipe's source.
        tokenizer: for a model in memory; otherwise the model's own is loaded.
        progress: told what happens.
        restart: throw away what an interrupted run left.
        overwrite: replace a result that is already there.
        requantize: take a model that is quantized already, and round what it decodes to.
        memory: what this process may take, in bytes or like ``2GB``: calibration batches and statistics for which
            there is no room wait on the disk of ``out``, and the result is the same to the byte. None: all stay.
        device: where blocks are computed, one at a time, as torch calls it (``cuda``, ``cuda:1``), or ``auto``: a GPU
            if there is one.

    Raises:
        QuantlabError: names the layer or argument, the value and the remedy; before any work where that is possible.
    """
    progress = progress or Silent()
    started = time.perf_counter()
    asked, out = Path(out).expanduser(), Path(out).expanduser().absolute()
    chosen = load_recipe(recipe, overrides)
    with computing(), joined() as ranks:
        progress = progress if ranks.writes else Silent()
        _check_out(out, overwrite)
        job = _prepare(model, chosen, calibration, tokenizer, requantize, choose_device(device, ranks.size))
        if job.observed and len(job.batches) < ranks.size:
            raise PreflightError(
                f"{ranks.size} processes and {len(job.batches)} batches of calibration sequences: some would have "
                "nothing to do; use more samples, or fewer processes"
            )
        budget = None if memory is None else parse_bytes(memory)
        needs = job.checked(out, budget)

        def begin() -> Journal:
            if restart and (partial_folder(out) / LOG).is_file():
                shutil.rmtree(partial_folder(out))
            return Journal(out, _identity(job.source, chosen, job.data), [*job.architecture.blocks, OUTSIDE])

        journal = begin() if ranks.size == 1 else SharedJournal(ranks, out, begin)
        try:
            plan = look_ahead(job.plan, job.source, job.skeleton, job.architecture)
            progress.start(Start(chosen, job.architecture, plan, job.described, journal.resumed, notes=job.notes))
            run = Run(job.source, job.skeleton, job.architecture, plan, job.batches, journal, progress, job.rescaling)
            run.ranks = ranks
            run.states = None if budget is None else budget - needs.memory.without_states
            run.states_on_device = None if needs.device is None else needs.device.states
            run.statistics_wait = needs.memory.waiting > 0
            run.execute()
        except BaseException:
            journal.abandon()
            raise
        reports = tuple(journal.reports)
        journal.finish(lambda journal: _finish(journal, job.source, job.skeleton, chosen))
    result = Result(
        folder=asked,
        recipe=chosen,
        reports=reports,
        calibration=job.described,
        bytes=weight_bytes(out),
        original_bytes=job.original_bytes,
        seconds=time.perf_counter() - started,
        resumed_blocks=len(journal.resumed),
    )
    progress.finish()
    return result


def dry_run(
    model: str | Path | PreTrainedModel,
    recipe: str | Path | Mapping[str, Any] | Recipe = "w4-gptq",
    out: str | Path = "quantized",
    *,
    overrides: Iterable[str] = (),
    calibration: CalibrationText | CalibrationData | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    requantize: bool = False,
    memory: int | str | None = None,
    device: str | torch.device = "cpu",
) -> Estimate:
    """What :func:`quantize` would do and take: every check, and one layer for its time. Nothing is written.

    Its arguments, and what it raises, are those of :func:`quantize`.
    """
    out = Path(out).expanduser().absolute()
    chosen = load_recipe(recipe, overrides)
    _check_out(out, overwrite)
    job = _prepare(model, chosen, calibration, tokenizer, requantize, choose_device(device))
    budget = None if memory is None else parse_bytes(memory)
    needs = job.checked(out, budget)
    return estimate(job.plan, job.source, job.skeleton, job.architecture, job.tokens, needs, job.described)


@dataclass(frozen=True, eq=False)
class _Job:
    """A model and a recipe, checked, and everything that a run of them needs."""

    source: ModelSource
    skeleton: PreTrainedModel
    architecture: Architecture
    plan: dict[str, PlannedLayer]
    original_bytes: int
    data: CalibrationData | None
    batches: list[torch.Tensor]
    rescaling: Rescaling | None
    notes: tuple[str, ...]

    @property
    def observed(self) -> bool:
        return any(layer.needs for layer in self.plan.values())

    @property
    def described(self) -> dict[str, Any]:
        return self.data.description if self.data else {}

    @property
    def tokens(self) -> int:
        return sum(batch.numel() for batch in self.batches)

    def checked(self, out: Path, budget: int | None) -> Needs:
        """What it will hold; refused if that is more than there is."""
        parts = (self.plan, self.architecture, self.skeleton, self.tokens)
        return preflight.check_resources(*parts, out, budget, self.source.device)


def _prepare(
    model: str | Path | PreTrainedModel,
    recipe: Recipe,
    calibration: CalibrationText | CalibrationData | None,
    tokenizer: Any,
    requantize: bool,
    device: torch.device,
) -> _Job:
    transforms = [make_transform(name, options) for name, options in recipe.transforms.items()]
    source: ModelSource = DeviceSource(_source(model, requantize), device)
    skeleton = source.skeleton()
    original_bytes = parameter_bytes(skeleton)
    architecture = describe(skeleton)
    plan = preflight.plan(recipe, architecture, skeleton)
    source, notes = _rotated(source, architecture, transforms)
    skeleton = source.skeleton() if notes is not None else skeleton
    awq = next((transform for transform in transforms if isinstance(transform, Awq)), None)
    observed = any(layer.needs for layer in plan.values())
    data, rescaling, batches = None, None, []
    if observed or awq:
        if tokenizer is None and not isinstance(calibration, torch.Tensor | CalibrationData):
            tokenizer = source.tokenizer()
        data = prepare(recipe.calibration, tokenizer, source.config, calibration)
        tokenizer = None  # some take as much memory as a block
        batches = data.batches() if observed else [data.tokens[:1, :_FEW]]
        rescaling = Rescaling(awq, skeleton, draw_sample(data.tokens, awq.tokens)) if awq else None
    return _Job(source, skeleton, architecture, plan, original_bytes, data, batches, rescaling, notes or ())


def _source(model: str | Path | PreTrainedModel, requantize: bool) -> ModelSource:
    if isinstance(model, PreTrainedModel):
        return ModuleSource(model)
    folder = resolve(model)
    return open_decoded(folder) if requantize and quant_method_of(folder) else open_source(folder)


def _rotated(
    source: ModelSource, architecture: Architecture, transforms: Iterable[Transform]
) -> tuple[ModelSource, tuple[str, ...] | None]:
    """The source with the rotations that were asked for, and what to know of them; None if there are none."""
    rotation = next((transform for transform in transforms if isinstance(transform, Hadamard)), None)
    return (source, None) if rotation is None else rotate(source, architecture, rotation)


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise PreflightError(f"{out} is a file; choose another --out")
    if out.is_symlink() or out.is_mount():  # could not be replaced by the finished folder
        what = "symbolic link" if out.is_symlink() else "mount point"
        raise PreflightError(f"{out} is a {what}; choose a folder in it: --out {out / 'model'}")
    if out.is_dir() and any(out.iterdir()):
        if not all((out / name).is_file() for name in (RECIPE, LOG, "config.json")):
            raise PreflightError(f"{out} holds something that quantlab did not write; choose another --out")
        if not overwrite:
            raise PreflightError(f"{out} already holds a quantized model; choose another --out, or add --overwrite")


def _identity(source: ModelSource, recipe: Recipe, data: CalibrationData | None) -> dict[str, Any]:
    """What the result's bytes depend on."""
    elsewhere = {} if source.device.type == "cpu" else {"device": source.device.type}
    return {
        **elsewhere,
        "quantlab": metadata.version("quantlab"),
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "model": source.fingerprint(),
        "recipe": recipe.to_dict(),
        "calibration": data.description if data else {},
    }


def _finish(journal: Journal, source: ModelSource, skeleton: PreTrainedModel, recipe: Recipe) -> None:
    (journal.folder / RECIPE).write_text(
        yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    config = copy.deepcopy(source.config)
    tied = set(skeleton.all_tied_weights_keys)
    if tied and tied <= {f"{layer}.weight" for layer in journal.storages}:
        config.tie_word_embeddings = False  # a quantized head has codes of its own
    journal.writer.finish(config, quantization_config(journal.storages), source.folder)
    journal.publish()
