"""What happened to one layer: one record for the log, the progress display and the journal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer.

    Attributes:
        layer: its full name.
        block: the block that it is in, or "" for a layer outside all blocks.
        quantizer: the method that chose its codes.
        compensation: the method that repaired what error was left, or ``"none"``.
        format: its grid.
        granularity: what shares a scale.
        scale_dtype: how scales are stored.
        shape: ``(out_features, in_features)``.
        bits: bits a weight, everything stored counted.
        bytes: bytes stored.
        error: relative error, squared: of the layer's output (``metric`` "output": ``tr(E H E^T) / tr(W H W^T)``), or
            of its weights, weighted by the inputs' second moment ("weighted") or plain ("weight"), by what was known.
        metric: see ``error``.
        tokens: calibration tokens that it saw; 0 if it needed none, or none reached it.
        notes: what a person should know.
        activations: what its inputs are rounded to, or ``"none"``; the error is of its weight alone.
        seconds: time spent on it; None for a layer that an earlier, interrupted run did.
    """

    layer: str
    block: str
    quantizer: str
    format: str
    granularity: int | str
    shape: tuple[int, int]
    bits: float
    bytes: int
    error: float
    metric: str
    tokens: int
    notes: tuple[str, ...] = ()
    compensation: str = "none"
    scale_dtype: str = ""
    activations: str = "none"
    seconds: float | None = None

    def record(self) -> dict[str, Any]:
        """A JSON-able record without the time, so that the same run gives the same bytes."""
        record = asdict(self)
        del record["seconds"]
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> LayerReport:
        """Undo :meth:`record`."""
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in record.items() if key in known}
        return cls(**{**values, "shape": tuple(values["shape"]), "notes": tuple(values["notes"])})
