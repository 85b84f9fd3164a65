"""Answers as a person reads them: tables and lines of what quantize and inspect return."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from quantlab.comparison import LayerComparison
    from quantlab.engine.estimate import Estimate
    from quantlab.engine.needs import Memory
    from quantlab.engine.quantize import Result
    from quantlab.engine.report import LayerReport
    from quantlab.inspection import InspectedLayer, Inspection

_WORST = 3
_USUAL_SCALES = ("", "bfloat16", "float16", "float32")
_LAYER_HEADERS = ("format", "shape", "bits", "error", "size")
_METRICS = {
    "output": "of the layers' outputs",
    "weighted": "of the weights, weighted by their inputs",
    "weight": "of the weights",
}


def clock(seconds: float) -> str:
    """A duration: ``0:07``, ``12:30``, ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: int) -> str:
    """Bytes: ``512 B``, ``470 kB``, ``1.9 MB``, ``269 MB``."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}" if value < 9.95 and unit != "B" else f"{value:.0f} {unit}"


def number(value: float) -> str:
    """An error: ``0.0114``, or ``4.1e-05`` where that would show nothing."""
    return f"{value:.4f}" if value >= 0.001 or value == 0 else f"{value:.1e}"


def scheme_name(layer: LayerReport | InspectedLayer) -> str:
    """A format, what shares a scale, and what is unusual: ``int4/64``, ``e2m1/32 e8m0``, ``int3/64 + qera-exact``.

    What inputs are rounded to stands behind an x: ``int8/channel x int8``.
    """
    scales = "" if layer.scale_dtype in _USUAL_SCALES else f" {layer.scale_dtype}"
    repair = "" if layer.compensation == "none" else f" + {layer.compensation}"
    inputs = "" if layer.activations == "none" else f" x {layer.activations}"
    return f"{layer.format}/{layer.granularity}{scales}{inputs}{repair}"


def describe_calibration(calibration: Mapping[str, Any]) -> Iterator[str]:
    """How calibration data came about; nothing if there was none."""
    if calibration:
        samples, length = calibration["samples"], calibration["length"]
        line = f"{samples} sequences of {length} tokens from {calibration['source']}"
        if "available" in calibration:
            line += f" ({calibration['available']} available)"
        yield f"{line}, {bos(calibration['bos'])}" if "bos" in calibration else line


def quantized(result: Result, *, model: str, peak_memory: int) -> Iterator[RenderableType]:
    """A finished run: its figures, its worst layers, and what to do next."""
    reports = result.reports
    table = pairs()
    table.add_row(
        "bits a weight",
        f"{result.bits:.2f} in the {len(reports)} quantized layers, scales and tables counted",
    )
    smaller = (
        f", {result.original_bytes / result.bytes:.1f} times smaller" if result.bytes < result.original_bytes else ""
    )
    table.add_row("size", f"{size(result.original_bytes)} → {size(result.bytes)}{smaller}")
    for metric in dict.fromkeys(report.metric for report in reports):
        errors = [report.error for report in reports if report.metric == metric]
        table.add_row(
            "relative error",
            f"{number(sum(errors) / len(errors))} on average, {_METRICS.get(metric, metric)}",
        )
    worst = sorted(reports, key=lambda report: -report.error)[:_WORST]
    for label, report in zip(["worst layers", "", ""], worst, strict=False):
        table.add_row(label, f"{number(report.error)}  {report.layer}")
    for line in describe_calibration(result.calibration):
        table.add_row("calibration", line)
    for label, line in zip(repeated("notes"), notes_of(reports), strict=False):
        table.add_row(label, line)
    resumed = f"; {result.resumed_blocks} blocks came from an interrupted run" if result.resumed_blocks else ""
    table.add_row("time", f"{clock(result.seconds)}, at most {size(peak_memory)} of memory{resumed}")
    table.add_row("result", str(result.folder))
    folder = shlex.quote(str(result.folder))
    table.add_row("next", f"quantlab eval {folder} --against {shlex.quote(model)}")
    yield Text(f"{model} quantized by {result.recipe.name}", style="bold")
    yield table


def estimated(estimate: Estimate, model: str, recipe: str) -> Iterator[RenderableType]:
    """A dry run: what would be done, and what it would take."""
    table = pairs()
    for label, (scheme, count) in zip(repeated("layers"), estimate.layers.items(), strict=False):
        table.add_row(label, f"{count} in {scheme}")
    table.add_row("bits a weight", f"{estimate.bits:.2f} in these layers, about; {estimate.blocks} blocks")
    for line in describe_calibration(estimate.calibration):
        table.add_row("calibration", line)
    for label, memory in (("memory", estimate.memory), (f"on {estimate.device}", estimate.on_device)):
        if memory is not None:
            table.add_row(label, f"about {size(memory.total)} at the peak: {_shares(memory)}")
    spilled = f", and {size(estimate.spilled)} of batches and statistics while it runs" if estimate.spilled else ""
    table.add_row("disk", f"about {size(estimate.disk)}{spilled}")
    table.add_row("time", f"about {clock(estimate.seconds)}, from timing {estimate.timed}")
    yield Text(f"{model} by {recipe}: nothing was done yet", style="bold")
    yield table


def _shares(memory: Memory) -> str:
    """What memory is for, in words."""
    parts = {
        "libraries": memory.libraries,
        "a block": memory.weights,
        "batches": memory.states,
        "statistics": memory.statistics,
        "solving": memory.solving,
    }
    return ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)


def inspected(
    inspection: Inspection, layers: Sequence[InspectedLayer], *, fold: bool, hidden: int
) -> Iterator[RenderableType]:
    """A folder: its layers, what was kept, totals.

    Args:
        inspection: all of it.
        layers: the layers to be shown, in order.
        fold: one line for the layers that differ only by a number in their names.
        hidden: how many layers are left out of ``layers``.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("layer", overflow="fold", ratio=1)
    headers = ("layers", "format", "bits", "mean ≤ max error", "size") if fold else _LAYER_HEADERS
    for header in headers:
        table.add_column(header, justify="right" if header != "format" else "left", no_wrap=True)
    for row in _folded_rows(layers) if fold else map(_layer_row, layers):
        table.add_row(*row)
    yield table
    if hidden:
        yield Text(f"and {hidden} more layers", style="dim")
    yield Text("")
    kept = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    kept.add_column("kept as it was", overflow="fold")
    for header in ("dtype", "shape", "size"):
        kept.add_column(header, justify="right" if header != "dtype" else "left", no_wrap=True)
    families: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for tensor in inspection.kept:
        families.setdefault((_family(tensor.name), tensor.dtype, tensor.shape), []).append(tensor.bytes)
    for (name, dtype, shape), sizes in sorted(families.items(), key=lambda item: -sum(item[1])):
        kept.add_row(_times(name, len(sizes)), dtype.lower(), _shape(shape), size(sum(sizes)))
    yield kept
    yield Text("")
    yield from _totals(inspection)


def verbatim(text: str) -> RenderableType:
    """Text as it stands: no wrapping, no colours."""
    return Text(text.rstrip("\n"), no_wrap=True, overflow="ignore")


def recipe_table(recipes: Mapping[str, str]) -> Iterator[RenderableType]:
    """Recipes by name, with when to use them."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("recipe", no_wrap=True, style="bold")
    table.add_column("when to use it", overflow="fold")
    for name, description in recipes.items():
        table.add_row(name, description)
    yield table
    yield Text("")
    yield Text("`quantlab recipes NAME` prints one; a file with lines like it is a recipe of your own.")


def _totals(inspection: Inspection) -> Iterator[RenderableType]:
    table = pairs()
    table.add_row("model", f"{inspection.architecture}, {inspection.weights:,} weights")
    run = inspection.run
    if inspection.recipe:
        recipe = inspection.recipe
        table.add_row("recipe", f"{recipe.get('name')}: {recipe.get('description')}".removesuffix(": "))
    table.add_row(
        "bits a weight",
        f"{inspection.bits:.3f} in the {len(inspection.layers)} quantized layers, scales and tables counted",
    )
    table.add_row("", f"{inspection.bits_of_model:.3f} in the whole model, with embeddings, head and norms")
    table.add_row(
        "size",
        f"{size(inspection.bytes_on_disk)}: {size(inspection.bytes_quantized)} quantized, "
        f"{size(inspection.bytes_kept)} kept",
    )
    for metric in dict.fromkeys(layer.metric for layer in inspection.layers if layer.metric):
        errors = [layer.error for layer in inspection.layers if layer.metric == metric and layer.error is not None]
        mean = sum(errors) / len(errors)
        worst = f"{number(max(errors))} at most, relative, {_METRICS.get(metric, metric)}"
        table.add_row("error", f"{number(mean)} on average, {worst}")
    for line in describe_calibration(run.get("calibration") or {}):
        table.add_row("calibration", line)
    for label, line in zip(repeated("notes"), notes_of(inspection.layers), strict=False):
        table.add_row(label, line)
    if run:
        versions = [f"{name} {run[name]}" for name in ("quantlab", "torch", "transformers") if name in run]
        table.add_row("made with", ", ".join(versions))
    yield table


def _layer_row(layer: InspectedLayer) -> tuple[str, ...]:
    error = "" if layer.error is None else number(layer.error)
    name = scheme_name(layer)
    return layer.layer, name, _shape(layer.shape), f"{layer.bits:.2f}", error, size(layer.bytes)


def _folded_rows(layers: Iterable[InspectedLayer]) -> Iterator[tuple[str, ...]]:
    families: dict[tuple[str, str, tuple[int, int]], list[InspectedLayer]] = {}
    for layer in layers:
        scheme = scheme_name(layer)
        families.setdefault((_family(layer.layer), scheme, layer.shape), []).append(layer)
    for (name, scheme, _), members in families.items():
        errors = [layer.error for layer in members if layer.error is not None]
        spread = f"{number(sum(errors) / len(errors))} ≤ {number(max(errors))}" if errors else ""
        bits = 8 * sum(layer.bytes for layer in members) / sum(layer.weights for layer in members)
        total = size(sum(layer.bytes for layer in members))
        yield name, str(len(members)), scheme, f"{bits:.2f}", spread, total


def _family(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _times(name: str, count: int) -> str:
    return name if count == 1 else f"{name} ×{count}"


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def notes_of(layers: Iterable[LayerReport | InspectedLayer | LayerComparison]) -> list[str]:
    """Each note once, without regard to numbers in it, with the number of layers and the first of them."""
    found: dict[str, tuple[str, list[str]]] = {}
    for layer in layers:
        for note in layer.notes:
            found.setdefault(re.sub(r"\d", "#", note), (note, []))[1].append(layer.layer)
    return [
        f"{names[0]}: {note}" + (f" (and {len(names) - 1} more layers)" if len(names) > 1 else "")
        for note, names in found.values()
    ]


def pairs() -> Table:
    """A table of labels and what belongs to them."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def repeated(label: str) -> Iterator[str]:
    """A label for the first of many lines, and nothing for the others."""
    yield label
    while True:
        yield ""


def bos(token: int | None) -> str:
    """How windows begin."""
    return "no BOS" if token is None else f"each begins with BOS (token {token})"
