"""The main plots as SVG, for a README: drawn here, with nothing that a browser would have to run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from ..errors import EvalError
from ..measures import Measure
from ..pareto import Front, Record, figure, pareto
from .page import name_of
from .verdicts import quality_of

_WIDTH, _HEIGHT = 860, 520
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 24, 52, 58
_COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#65a30d", "#be185d")
_TICKS = 6


def pictures(records: Sequence[Record], about: Mapping[str, Any]) -> dict[str, str]:
    """SVG by name: ``front`` (quality against bits), ``size`` (against bytes), ``speed`` (against decoding).

    Those whose measures were not taken are left out.
    """
    whole = [record for record in records if "error" not in record]
    quality = quality_of(whole)
    drawn = {}
    for name, across in (("front", "bits"), ("size", "bytes"), ("speed", "decode")):
        try:
            front = pareto(whole, [across, quality.name if quality else "kl"])
        except EvalError:
            continue
        drawn[name] = _scatter(front, name_of(about))
    return drawn


def _scatter(front: Front, model: str) -> str:
    across, up = (_Axis(measure, front.records) for measure in front.measures)
    methods = list(dict.fromkeys(_method(record) for record in front.records))
    title = f"{model}: {up.measure.label} against {across.measure.label}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
        ' font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="22" font-size="15" font-weight="600" fill="#1a202c">{escape(title)}</text>',
        *_legend(methods),
        *_grid(across, up),
        *_line(front, across, up),
    ]
    for place, record in enumerate(front.records):
        x, y = across.place(record, _LEFT, _WIDTH - _RIGHT), up.place(record, _HEIGHT - _BOTTOM, _TOP)
        on = place in front.members
        colour = _COLOURS[methods.index(_method(record)) % len(_COLOURS)]
        said = f"{record['variant']}: {figure(record, across.measure):.4g}, {figure(record, up.measure):.4g}"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{5 if on else 4}" fill="{colour}"'
            f' fill-opacity="{1 if on else 0.45}" stroke="#ffffff"><title>{escape(said)}</title></circle>'
        )
        if on:
            end = x > _WIDTH - 180
            anchor = ' text-anchor="end"' if end else ""
            at = f'x="{x + (-9 if end else 9):.1f}" y="{y - 6:.1f}"'
            parts.append(f'<text {at}{anchor} fill="#2d3748">{escape(record["variant"])}</text>')
    return "\n".join([*parts, "</svg>", ""])


class _Axis:
    """Where a measure's figures lie on a line."""

    def __init__(self, measure: Measure, records: Sequence[Record]) -> None:
        self.measure = measure
        values = [value for record in records if (value := figure(record, measure)) is not None]
        positive = [value for value in values if value > 0]
        self.logarithmic = measure.logarithmic and len(positive) == len(values)
        low, high = self._scaled(min(values)), self._scaled(max(values))
        room = 0.06 * (high - low) or 0.5
        self.low, self.high = low - room, high + room

    def place(self, record: Record, start: float, end: float) -> float:
        value = figure(record, self.measure)
        assert value is not None
        return self.at(value, start, end)

    def at(self, value: float, start: float, end: float) -> float:
        return start + (self._scaled(value) - self.low) / (self.high - self.low) * (end - start)

    def ticks(self) -> list[float]:
        """Round figures within the axis."""
        if self.logarithmic:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5)):
                found = [s * 10.0**d for d in decades for s in steps if self.low <= math.log10(s) + d <= self.high]
                if len(found) >= 3:
                    return found
        low, high = (10**self.low, 10**self.high) if self.logarithmic else (self.low, self.high)
        rough = (high - low) / _TICKS
        decade = 10.0 ** math.floor(math.log10(rough))
        step = next(s * decade for s in (1, 2, 5, 10) if s * decade >= rough)
        found = [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
        return [tick for tick in found if tick > 0 or not self.logarithmic]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value


def _method(record: Record) -> str:
    labels = record.get("labels", {})
    repair = labels.get("compensation", "none")
    return str(labels.get("quantizer", record["kind"])) + (f" + {repair}" if repair != "none" else "")


def _legend(methods: Sequence[str]) -> Iterator[str]:
    x = _LEFT
    for place, method in enumerate(methods):
        yield f'<circle cx="{x + 5}" cy="38" r="5" fill="{_COLOURS[place % len(_COLOURS)]}"/>'
        yield f'<text x="{x + 15}" y="42" fill="#4a5568">{escape(method)}</text>'
        x += 34 + 7 * len(method)


def _grid(across: _Axis, up: _Axis) -> Iterator[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for tick in across.ticks():
        x = across.at(tick, _LEFT, right)
        yield f'<line x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#e2e8f0"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#4a5568">{tick:g}</text>'
    for tick in up.ticks():
        y = up.at(tick, bottom, _TOP)
        yield f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#e2e8f0"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#4a5568">{tick:g}</text>'
    x, y = (_LEFT + right) / 2, (_TOP + bottom) / 2
    label = 'text-anchor="middle" fill="#1a202c"'
    yield f'<text x="{x}" y="{_HEIGHT - 14}" {label}>{escape(_named(across))}</text>'
    yield f'<text transform="translate(18 {y}) rotate(-90)" {label}>{escape(_named(up))}</text>'


def _named(axis: _Axis) -> str:
    measure = axis.measure
    unit = f" ({measure.unit})" if measure.unit and measure.unit not in measure.label else ""
    return f"{measure.label}{unit}"


def _line(front: Front, across: _Axis, up: _Axis) -> Iterator[str]:
    """The border of what the front dominates: a staircase."""
    if len(front.members) < 2:
        return
    points = [front.records[place] for place in front.members]
    path = []
    for place, record in enumerate(points):
        x, y = across.place(record, _LEFT, _WIDTH - _RIGHT), up.place(record, _HEIGHT - _BOTTOM, _TOP)
        corner = (
            "" if not place else (f"V{y:.1f} H{x:.1f}" if across.measure.higher_is_better else f"H{x:.1f} V{y:.1f}")
        )
        path.append(corner or f"M{x:.1f} {y:.1f}")
    yield f'<path d="{" ".join(path)}" fill="none" stroke="#94a3b8" stroke-width="1.5"/>'
