"""Ways to quantize, compared layer by layer in one pass over the model: error of weights and outputs against bits."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from quantlab_evals.machine import device_name

from quantlab.checkpoint.on_device import DeviceSource
from quantlab.checkpoint.resolve import Model, name_of, source_of
from quantlab.engine import preflight
from quantlab.engine.architecture import OUTSIDE, Architecture, describe
from quantlab.engine.calibration import CalibrationData, CalibrationText, prepare
from quantlab.engine.device import choose_device, computing
from quantlab.engine.progress import Progress, Silent, Start
from quantlab.engine.selection import Plan, choose_layers, plan_each, wanted
from quantlab.engine.survey import Measured, Survey
from quantlab.errors import PreflightError, RecipeError
from quantlab.problem import Statistic
from quantlab.recipe import Recipe, Scheme, load_recipe
from quantlab.variants import Grid, Variant, expand

_REMEDY = "end what else is on the device, use fewer calibration tokens, or --device cpu"
# Blocks that are looked at if nobody says which.
BLOCKS = 4


@dataclass(frozen=True)
class Spread:
    """A relative error over layers, each counted by its weights."""

    mean: float
    median: float


@dataclass(frozen=True)
class LayerComparison:
    """One layer under one variant.

    Attributes:
        layer: its full name.
        shape: ``(out_features, in_features)``.
        bits: bits a weight, everything stored counted.
        bytes: the same, in bytes.
        weight_error: ``|W - Q|^2 / |W|^2``.
        output_error: ``tr(E H E^T) / tr(W H W^T)`` with ``E = W - Q`` and the inputs' second moment ``H``; None if no
            input was seen.
        tokens: calibration tokens that the layer saw.
        seconds: that solving it took.
        notes: what a person should know.
    """

    layer: str
    shape: tuple[int, int]
    bits: float
    bytes: int
    weight_error: float
    output_error: float | None
    tokens: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """How many weights the layer has."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class VariantComparison:
    """One variant over all layers."""

    variant: Variant
    layers: tuple[LayerComparison, ...]

    @property
    def bits(self) -> float:
        """Bits a weight over all layers, everything stored counted."""
        return 8 * sum(layer.bytes for layer in self.layers) / sum(layer.weights for layer in self.layers)

    @property
    def weight_error(self) -> Spread:
        """The error of the weights."""
        return _spread([(layer.weight_error, layer.weights) for layer in self.layers])

    @property
    def output_error(self) -> Spread | None:
        """The error of the outputs, over the layers whose inputs were seen; None if none were."""
        seen = [(layer.output_error, layer.weights) for layer in self.layers if layer.output_error is not None]
        return _spread(seen) if seen else None

    @property
    def error(self) -> float:
        """The mean error of the outputs, or of the weights where no input was seen."""
        return (self.output_error or self.weight_error).mean

    @property
    def seconds(self) -> float:
        """That solving its layers took."""
        return sum(layer.seconds for layer in self.layers)


@dataclass(frozen=True)
class Skipped:
    """A variant that cannot be carried out, and why."""

    variant: Variant
    reason: str


@dataclass(frozen=True)
class Comparison:
    """Variants, compared on the same layers with the same statistics.

    Attributes:
        model: what was looked at.
        recipe: the name of the recipe that the variants differ from.
        selection: which layers, in words.
        variants: in the order of the grid.
        skipped: combinations that cannot be carried out.
        calibration: how the calibration data came about; empty if no input was seen.
        notes: what a person should know.
        seconds: that all of it took.
        device: that it was measured on.
    """

    model: str
    recipe: str
    selection: str
    variants: tuple[VariantComparison, ...]
    skipped: tuple[Skipped, ...]
    calibration: dict[str, Any]
    notes: tuple[str, ...]
    seconds: float
    device: str = "cpu"

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers."""
        return tuple(layer.layer for layer in self.variants[0].layers)

    def front(self) -> tuple[VariantComparison, ...]:
        """The variants that no other beats: every other one with no more bits has a larger error.

        Bits count to two places: a table that is shorter by a value is no merit.
        """
        best, front = float("inf"), []
        for compared in sorted(self.variants, key=lambda compared: (round(compared.bits, 2), compared.error)):
            if compared.error < best:
                best = compared.error
                front.append(compared)
        return tuple(front)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able mapping of everything, summaries included; :meth:`from_dict` reads it back."""
        front = {compared.variant.name for compared in self.front()}
        variants = [
            {
                "variant": compared.variant.name,
                "scheme": asdict(compared.variant.scheme),
                "bits": compared.bits,
                "weight_error": asdict(compared.weight_error),
                "output_error": asdict(compared.output_error) if compared.output_error else None,
                "front": compared.variant.name in front,
                "seconds": compared.seconds,
                "layers": [asdict(layer) for layer in compared.layers],
            }
            for compared in self.variants
        ]
        skipped = [
            {"variant": entry.variant.name, "scheme": asdict(entry.variant.scheme), "reason": entry.reason}
            for entry in self.skipped
        ]
        flat = {name: getattr(self, name) for name in ("model", "recipe", "selection", "calibration", "notes")}
        return {**flat, "device": self.device, "seconds": self.seconds, "variants": variants, "skipped": skipped}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Comparison:
        """Undo :meth:`to_dict`, through JSON or not."""

        def variant(entry: Mapping[str, Any]) -> Variant:
            return Variant(entry["variant"], Scheme(**entry["scheme"]))

        def layer(entry: Mapping[str, Any]) -> LayerComparison:
            return LayerComparison(**{**entry, "shape": tuple(entry["shape"]), "notes": tuple(entry["notes"])})

        compared = [VariantComparison(variant(v), tuple(map(layer, v["layers"]))) for v in data["variants"]]
        skipped = [Skipped(variant(entry), entry["reason"]) for entry in data["skipped"]]
        plain = {name: data[name] for name in ("model", "recipe", "selection", "calibration", "seconds")}
        plain["device"] = data.get("device", "cpu")
        return cls(**plain, variants=tuple(compared), skipped=tuple(skipped), notes=tuple(data["notes"]))


def compare(
    model: Model,
    grid: Grid,
    *,
    recipe: str | Path | Mapping[str, Any] | Recipe = "w4-rtn",
    overrides: Iterable[str] = (),
    layers: Sequence[str] | None = None,
    blocks: int | None = BLOCKS,
    outputs: bool = False,
    device: str | torch.device = "cpu",
    calibration: CalibrationText | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Comparison:
    """Quantize some layers in every way of a grid, each by itself, and say how far each is from the original.

    The model stays as it is: every layer is measured with the inputs that it has in the original model, so a layer's
    error does not depend on what is tried elsewhere. It is not the quality of a quantized model.

    Args:
        model: a local folder, a ``.gguf`` file, a Hugging Face id, ``demo``, or a model in memory.
        grid: the choices to combine, as text, a mapping or a YAML file; see :mod:`quantlab.variants`.
        recipe: what holds on the axes that the grid does not name; its exceptions by pattern are not applied.
        overrides: ``key=value`` changes to the recipe.
        layers: patterns of layers, as in recipes. None: all linear layers of ``blocks`` blocks.
        blocks: how many blocks, spread evenly over the model; None: all.
        outputs: measure outputs even where no method needs inputs.
        device: where layers are tried: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: a GPU if there is one.
        calibration: documents, or token ids int64 ``[samples, length]``, instead of the recipe's source.
        tokenizer: for a model in memory; otherwise the model's own is loaded.
        progress: told what happens: each layer, once for every variant.

    Raises:
        QuantlabError: before any work: a device, grid, pattern or recipe that cannot be, or a grid none of whose
            combinations can.
    """
    progress, started = progress or Silent(), time.perf_counter()
    where = choose_device(device)
    chosen = load_recipe(recipe, overrides)
    if chosen.transforms:
        rewritten = ", ".join(chosen.transforms)
        raise RecipeError(
            f"recipe {chosen.name!r} rewrites the model ({rewritten}), and compare measures it as it is; "
            "add --set transforms=none"
        )
    variants = expand(grid, chosen.default)
    source = DeviceSource(source_of(model), where)
    skeleton = source.skeleton()
    architecture = describe(skeleton)
    names, selection = choose_layers(layers, blocks, architecture, skeleton)
    plans, skipped = plan_each([variant.scheme for variant in variants], names, architecture, skeleton)
    if not plans:
        raise _nothing_left(skipped)
    needed, data = wanted(plans.values()), None
    if outputs or needed:
        if tokenizer is None and not isinstance(calibration, torch.Tensor):
            tokenizer = source.tokenizer()
        data = prepare(chosen.calibration, tokenizer, source.config, calibration)
        tokenizer = None  # some take as much memory as a block
    start = _start(chosen, architecture, next(iter(plans.values())), data, len(plans))
    preflight.check_memory(start.plan, architecture, skeleton, data.tokens.numel() if data else 0, where)
    progress.start(start)
    batches = data.batches() if data else []
    survey = Survey(source, skeleton, architecture, list(plans.values()), batches, progress)
    with computing(_REMEDY):
        measured = survey.execute()
    progress.finish()
    skipped |= {list(plans)[place]: reason for place, reason in survey.refused.items()}
    if len(skipped) == len(variants):
        raise _nothing_left(skipped)
    return Comparison(
        model=name_of(model),
        recipe=chosen.name,
        selection=selection,
        variants=tuple(
            VariantComparison(variants[index], _layers(names, [found for found in measured if found.plan == place]))
            for place, index in enumerate(plans)
            if index not in skipped
        ),
        skipped=tuple(Skipped(variants[index], skipped[index]) for index in sorted(skipped)),
        calibration=data.description if data else {},
        notes=_notes(chosen, needed),
        seconds=time.perf_counter() - started,
        device=device_name(where),
    )


def _nothing_left(skipped: Mapping[int, str]) -> PreflightError:
    reasons = "; ".join(dict.fromkeys(skipped.values()))
    return PreflightError(f"none of the grid's {len(skipped)} combinations can be carried out: {reasons}")


def _start(recipe: Recipe, architecture: Architecture, plan: Plan, data: CalibrationData | None, ways: int) -> Start:
    """What the progress display is told; of the blocks, those that will be run."""
    places = {layer.block for layer in plan.values()}
    blocks = tuple(block for block in architecture.blocks if block in places)
    if data is not None:
        last = len(architecture.blocks) if OUTSIDE in places else 1 + architecture.blocks.index(blocks[-1])
        blocks = architecture.blocks[:last]
    return Start(
        recipe, replace(architecture, blocks=blocks), plan, data.description if data else {}, (), variants=ways
    )


def _layers(names: Sequence[str], measured: Iterable[Measured]) -> tuple[LayerComparison, ...]:
    found = {measurement.report.layer: measurement for measurement in measured}
    return tuple(_layer(found[name]) for name in names)


def _layer(measured: Measured) -> LayerComparison:
    report = measured.report
    return LayerComparison(
        layer=report.layer,
        shape=report.shape,
        bits=report.bits,
        bytes=report.bytes,
        weight_error=measured.weight_error,
        output_error=report.error if report.metric == "output" else None,
        tokens=report.tokens,
        seconds=report.seconds or 0.0,
        notes=report.notes,
    )


def _notes(recipe: Recipe, needed: Statistic) -> tuple[str, ...]:
    notes = []
    if recipe.layers:
        notes.append(f"the recipe's exceptions for {', '.join(recipe.layers)} are not applied")
    if Statistic.SHIFT in needed:
        notes.append("asym has no effect here: no layer before is quantized, so inputs are those of the original model")
    return tuple(notes)


def _spread(errors: Sequence[tuple[float, int]]) -> Spread:
    """Mean and median of errors, each counted by its weights."""
    ranked = sorted(errors)
    reached = list(accumulate(weights for _, weights in ranked))
    median = ranked[bisect_left(reached, reached[-1] / 2)][0]
    return Spread(sum(error * weights for error, weights in ranked) / reached[-1], median)
