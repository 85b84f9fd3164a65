"""The page: one file with data, style, program and plotly in it. It asks no network for anything."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..errors import EvalError
from ..measures import MEASURES, PREDICTED, Measure, measure_called
from ..pareto import Record, figure
from .verdicts import quality_of, verdicts

_DIGITS = 5


def page(records: Sequence[Record], about: Mapping[str, Any]) -> str:
    """Variants of a model as a web page.

    Args:
        records: with ``variant``, ``kind``, ``labels`` and ``measures``; and where there are any, ``recipe``,
            ``layers``, ``evaluation``, ``notes``, ``error``.
        about: ``model``, and what it says of the measurement.

    Raises:
        EvalError: nothing was measured, or plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise EvalError("the report is drawn by plotly, which is missing: pip install plotly") from error
    document = content(records, about)
    parts = {
        "title": html.escape(f"{document['name']}: {document['title']}"),
        "style": _file("page.css"),
        "program": _file("page.js"),
        "plotly": get_plotlyjs(),
        # Inside a script element nothing may look like its end.
        "data": json.dumps(document, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"),
    }
    text = _file("page.html")
    before, *rest = text.split("{{")
    pieces = [before]
    for piece in rest:
        name, after = piece.split("}}", 1)
        pieces += [parts[name], after]
    return "".join(pieces)


def content(records: Sequence[Record], about: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows, as JSON: its variants by place, measures, layers, verdicts and the measurement.

    Raises:
        EvalError: nothing was measured.
    """
    whole = [record for record in records if "error" not in record]
    measures = _measures(whole)
    if len(measures) < 2:
        raise EvalError("no variant has two figures to draw; measure some first")
    layers = list(dict.fromkeys(layer["layer"] for record in whole for layer in record.get("layers", ())))
    quality = quality_of(whole)
    names = [measure.name for measure in measures]
    return {
        "model": str(about.get("model", "")),
        "name": name_of(about),
        "title": f"{len([r for r in whole if r['kind'] != 'original'])} variants",
        "measures": [measure.to_dict() for measure in measures],
        "axes": [next(n for n in ("bits", "bytes", *names) if n in names), quality.name if quality else names[1]],
        "layers": layers,
        "variants": [_variant(record, names, layers) for record in whole],
        "failed": [{"name": r["variant"], "error": r["error"]} for r in records if "error" in r],
        "verdicts": [verdict.to_dict() for verdict in verdicts(whole)],
        "measurement": _measurement(whole, about),
    }


def name_of(about: Mapping[str, Any]) -> str:
    """What the model is called; of a path, its end."""
    model = str(about.get("model", ""))
    return Path(model).name if Path(model).is_absolute() else model


def _measures(records: Sequence[Record]) -> list[Measure]:
    """Those of which two variants have a figure; predictions last."""
    known = [*MEASURES, *dict.fromkeys(n for r in records for n in r["measures"] if n.startswith(PREDICTED))]
    found = [measure_called(name) for name in known]
    return [m for m in found if sum(figure(record, m) is not None for record in records) > 1]


def _variant(record: Record, measures: Sequence[str], layers: Sequence[str]) -> dict[str, Any]:
    by_name = {layer["layer"]: layer for layer in record.get("layers", ())}
    evaluation = record.get("evaluation") or {}
    reliability = (evaluation.get("calibration") or {}).get("reliability")
    recipe = record.get("recipe")
    return {
        "name": record["variant"],
        "kind": record["kind"],
        "labels": record.get("labels", {}),
        "measures": {name: _short(figure(record, measure_called(name))) for name in measures},
        "recipe": None if recipe is None else yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True),
        "errors": [_short(by_name[name]["error"]) if name in by_name else None for name in layers] if by_name else None,
        "bits": [_short(by_name[name]["bits"]) if name in by_name else None for name in layers] if by_name else None,
        "metric": next(iter(by_name.values()))["metric"] if by_name else None,
        "reliability": None
        if reliability is None
        else [[_short(part["confidence"]), _short(part["accuracy"]), part["count"]] for part in reliability],
        "notes": list(record.get("notes", ())),
    }


def _measurement(records: Sequence[Record], about: Mapping[str, Any]) -> dict[str, str]:
    """Every choice that the figures depend on, for people."""
    said: dict[str, Any] = {"model": about.get("model"), **(about.get("measurement") or {})}
    settings: Mapping[str, Any] = next(
        (record["evaluation"]["settings"] for record in records if record.get("evaluation")), {}
    )
    said |= settings
    for key in ("versions", "calibration"):
        if value := next((record[key] for record in records if record.get(key)), None):
            said[key] = ", ".join(f"{name} {entry}" for name, entry in value.items())
    machine = next((record["speed"]["machine"] for record in records if record.get("speed")), None)
    if machine:
        said["machine"] = ", ".join(f"{name} {entry}" for name, entry in machine.items())
    return {
        name.replace("_", " "): value if isinstance(value, str) else json.dumps(value, default=str)
        for name, value in said.items()
        if value not in (None, "", [], {})
    }


def _short(value: float | None) -> float | None:
    """A figure without digits that nobody needs."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{_DIGITS}g}")


def _file(name: str) -> str:
    return (resources.files("quantlab_evals.report") / name).read_text(encoding="utf-8")
