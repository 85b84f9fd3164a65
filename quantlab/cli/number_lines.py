"""The formats as a person sees them: a table of what they cost, and a picture of where their values lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from quantlab.formats import DescribedFormat

_COLOURS = {"int": "#2b6cb0", "float": "#b7530b", "table": "#2f855a", "fitted": "#805ad5"}
_FAMILIES = {"int": "integers", "float": "minifloats", "table": "fixed tables", "fitted": "fitted to a layer"}
_ROW, _LEFT, _WIDTH, _TOP, _RIGHT = 30, 110, 760, 56, 30


def table(formats: Sequence[DescribedFormat], plot: Path | None) -> Iterator[RenderableType]:
    """Formats by name: bits, range, bits a weight under the usual scales, when to use them."""
    listed = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    listed.add_column("format", no_wrap=True, style="bold")
    for header in ("bits", "values", "lowest", "highest", *formats[0].bits_per_weight):
        listed.add_column(header, justify="right")
    listed.add_column("use it when", overflow="fold")
    for entry in formats:
        costs = [f"{cost:.2f}" for cost in entry.bits_per_weight.values()]
        ends = [f"{end:.4g}" for end in (entry.values[0], entry.values[-1])]
        listed.add_row(entry.name, str(entry.bits), str(len(entry.values)), *ends, *costs, entry.use)
    yield listed
    yield Text("")
    yield Text(
        "Bits a weight, everything counted, of a 4096 x 4096 weight, by what shares a scale and how it is stored."
    )
    yield Text(
        "There are more widths: int2..int8, nf2..nf8, power2..power8, codebook1..codebook8, eXmY of 3 to 8 bits."
    )
    if plot is not None:
        yield Text(f"drawn: {plot}")


def svg(formats: Sequence[DescribedFormat]) -> str:
    """A picture: each format's values, divided by the largest magnitude, as ticks on a line from -1 to 1."""
    height = _TOP + _ROW * len(formats) + 34
    width = _LEFT + _WIDTH + _RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        ' font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *_legend(),
    ]
    bottom = _TOP + _ROW * len(formats)
    for mark in (-1, -0.5, 0, 0.5, 1):
        x = _across(mark)
        parts.append(f'<line x1="{x:.1f}" y1="{_TOP - 8}" x2="{x:.1f}" y2="{bottom}" stroke="#e2e8f0"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#4a5568">{mark:g}</text>')
    for row, entry in enumerate(formats):
        parts += _line(entry, _TOP + _ROW * row + _ROW // 2)
    return "\n".join([*parts, "</svg>", ""])


def _legend() -> Iterator[str]:
    for k, (family, words) in enumerate(_FAMILIES.items()):
        x = _LEFT + 150 * k
        yield f'<rect x="{x}" y="17" width="10" height="10" fill="{_COLOURS[family]}"/>'
        yield f'<text x="{x + 16}" y="27" fill="#2d3748">{words}</text>'


def _line(entry: DescribedFormat, y: int) -> Iterator[str]:
    colour = _COLOURS[entry.family]
    yield f'<text x="{_LEFT - 14}" y="{y + 4}" text-anchor="end" fill="#1a202c">{escape(entry.name)}</text>'
    yield f'<line x1="{_across(-1):.1f}" y1="{y}" x2="{_across(1):.1f}" y2="{y}" stroke="#a0aec0"/>'
    # Many values lie closer together than a thick line would show.
    thickness = 1.6 if len(entry.values) <= 32 else 0.7
    ticks = "".join(f"M{_across(value):.2f} {y - 8}V{y + 8}" for value in entry.normalized)
    yield f'<path d="{ticks}" stroke="{colour}" stroke-width="{thickness}" fill="none"/>'


def _across(value: float) -> float:
    return _LEFT + (value + 1) / 2 * _WIDTH
