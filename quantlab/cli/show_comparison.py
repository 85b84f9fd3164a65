"""A comparison as a person reads it: a table, and a plot of error against bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from quantlab.cli.progress import note_kind
from quantlab.cli.show import clock, describe_calibration, notes_of, number, pairs, repeated
from quantlab.errors import QuantlabError

if TYPE_CHECKING:
    from quantlab.comparison import Comparison, VariantComparison


def compared(comparison: Comparison, *, plot: Path | None) -> Iterator[RenderableType]:
    """A table of the variants, fewest bits first, and how it came about."""
    front = {entry.variant.name for entry in comparison.front()}
    seen = any(entry.output_error for entry in comparison.variants)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("variant", overflow="fold")
    for header in ("bits", *(("output error", "median") if seen else ()), "weight error", "median", "seconds"):
        table.add_column(header, justify="right", no_wrap=True)
    # As in the front: bits that differ by a table's few bytes are the same.
    for entry in sorted(comparison.variants, key=lambda entry: (round(entry.bits, 2), entry.error)):
        best = entry.variant.name in front
        errors = [entry.output_error] if seen else []
        cells = [cell for error in [*errors, entry.weight_error] for cell in _cells(error)]
        row = ("*" if best else "", entry.variant.name, f"{entry.bits:.3f}", *cells, f"{entry.seconds:.1f}")
        table.add_row(*row, style="bold" if best else "")
    yield Text(f"{comparison.model}: {len(comparison.variants)} ways to quantize it", style="bold")
    yield table
    yield Text("")
    yield _choices(comparison, plot)


def _cells(error: Any) -> tuple[str, str]:
    return ("", "") if error is None else (number(error.mean), number(error.median))


def _choices(comparison: Comparison, plot: Path | None) -> Table:
    table = pairs()
    table.add_row("*", "no other has a smaller error with no more bits")
    table.add_row("errors", "squared, relative to the original; mean and median over layers, counted by their weights")
    table.add_row("layers", comparison.selection)
    calibration = list(describe_calibration(comparison.calibration)) or ["none: no method needs it; --outputs takes it"]
    for line in calibration:
        table.add_row("calibration", line)
    table.add_row("in common", _common(comparison))
    reasons: dict[str, list[str]] = {}
    for entry in comparison.skipped:
        reasons.setdefault(entry.reason, []).append(entry.variant.name)
    for label, (reason, names) in zip(repeated("skipped"), reasons.items(), strict=False):
        table.add_row(label, f"{', '.join(names)}: {reason}")
    # A layer has the same note under many variants.
    noted = [(layer, note) for entry in comparison.variants for layer in entry.layers for note in layer.notes]
    layers = {(layer.layer, note_kind(note)): replace(layer, notes=(note,)) for layer, note in noted}
    for label, note in zip(repeated("notes"), [*comparison.notes, *notes_of(layers.values())], strict=False):
        table.add_row(label, note)
    table.add_row("time", f"{clock(comparison.seconds)}, on {comparison.device}")
    if plot is not None:
        table.add_row("plot", str(plot))
    return table


def _common(comparison: Comparison) -> str:
    """What all variants have in common, beside what their names say."""
    schemes = [entry.variant.scheme for entry in comparison.variants]
    found = {f"{scheme.scale_dtype} scales" for scheme in schemes}, {f"{s.scale_search} search" for s in schemes}
    symmetry = {"symmetric" if scheme.symmetric else "asymmetric" for scheme in schemes}
    shared = [next(iter(values)) for values in (*found, symmetry) if len(values) == 1]
    return ", ".join([*shared, f"otherwise as recipe {comparison.recipe}"])


def check_plot(file: Path) -> None:
    """Refuse a plot that could not be written in the end.

    Raises:
        QuantlabError: says why, and what to do.
    """
    if file.suffix != ".html":
        raise QuantlabError(f"--plot {file}: a plot is a web page; give it a name that ends in .html")
    if not file.absolute().parent.is_dir():
        raise QuantlabError(f"--plot {file}: there is no folder {file.parent}; make it first")
    if find_spec("plotly") is None:
        raise QuantlabError(f"--plot {file}: plots are drawn by plotly, which is missing: pip install plotly")


def plotted(comparison: Comparison) -> str:
    """The page of a sweep's report, of a comparison: errors against bits, a point a variant; it needs no network."""
    from quantlab_evals.report import page

    about = {
        "model": comparison.model,
        "measurement": {
            "layers": comparison.selection,
            "in common": _common(comparison),
            "calibration": "; ".join(describe_calibration(comparison.calibration)),
            "not the whole model": "each layer is quantized by itself; errors do not add up through the layers",
        },
    }
    failed = [
        {"variant": entry.variant.name, "kind": "quantized", "labels": {}, "error": entry.reason}
        for entry in comparison.skipped
    ]
    return page([*map(_record, comparison.variants), *failed], about)


def _record(entry: VariantComparison) -> dict[str, Any]:
    """A variant as a record of a sweep."""
    from quantlab.recipe import Recipe

    scheme = entry.variant.scheme
    seen = entry.output_error
    return {
        "variant": entry.variant.name,
        "kind": "quantized",
        "labels": {
            "format": scheme.format,
            "group": str(scheme.granularity),
            "quantizer": scheme.quantizer,
            "compensation": scheme.compensation,
            "scales": scheme.scale_dtype,
            "search": scheme.scale_search,
        },
        "measures": {
            "bits": entry.bits,
            "output_error": None if seen is None else seen.mean,
            "weight_error": entry.weight_error.mean,
            "quantize_seconds": entry.seconds,
        },
        "recipe": Recipe(name=entry.variant.name, default=scheme).to_dict(),
        "layers": [
            {
                "layer": layer.layer,
                "bits": layer.bits,
                "error": layer.weight_error if layer.output_error is None else layer.output_error,
                "metric": "weight" if layer.output_error is None else "output",
            }
            for layer in entry.layers
        ],
    }
