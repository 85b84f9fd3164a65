"""A comparison as a person reads it: a table, and a plot of error against bits."""

from __future__ import annotations

import html
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

_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf")
_ERRORS = {"output_error": "error of the outputs, relative", "weight_error": "error of the weights, relative"}


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
    table.add_row("time", clock(comparison.seconds))
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
    """Error against bits, a point a variant, as a page that needs no network."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    from quantlab.variants import method_name

    measured = [name for name in _ERRORS if any(getattr(entry, name) for entry in comparison.variants)]
    figure = make_subplots(rows=len(measured), cols=1, shared_xaxes=True, vertical_spacing=0.06)
    series: dict[str, list[VariantComparison]] = {}
    for entry in comparison.variants:
        series.setdefault(method_name(entry.variant.scheme), []).append(entry)
    for row, name in enumerate(measured, start=1):
        for place, (method, entries) in enumerate(series.items()):
            labels = [f"{entry.variant.scheme.format}/{entry.variant.scheme.granularity}" for entry in entries]
            figure.add_trace(
                go.Scatter(
                    x=[entry.bits for entry in entries],
                    y=[getattr(entry, name).mean for entry in entries],
                    mode="markers+text",
                    name=html.escape(method),
                    legendgroup=method,
                    showlegend=row == 1,
                    marker={"size": 10, "color": _COLORS[place % len(_COLORS)]},
                    text=labels,
                    textposition="middle right",
                    textfont={"size": 10},
                    customdata=[html.escape(entry.variant.name) for entry in entries],
                    hovertemplate="%{customdata}<br>%{x:.3f} bits, %{y:.3g}<extra></extra>",
                ),
                row=row,
                col=1,
            )
        figure.update_yaxes(title_text=_ERRORS[name], type="log", row=row, col=1)
    figure.update_xaxes(title_text="bits a weight, everything stored counted", row=len(measured), col=1)
    title = f"{html.escape(comparison.model)}: {html.escape(comparison.selection)}"
    figure.update_layout(
        title={"text": title, "font": {"size": 14}}, template="plotly_white", height=480 * len(measured)
    )
    return figure.to_html(include_plotlyjs=True, full_html=True, div_id="comparison")
