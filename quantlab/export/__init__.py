"""A quantized model in the formats of other tools: its own codes where they fit, and the reason where they do not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from quantlab.checkpoint.quantized import QuantizedFolder
from quantlab.errors import CheckpointError
from quantlab.export.base import Export, ExportedLayer

__all__ = ["FORMATS", "Export", "ExportedLayer", "export"]

FORMATS = {
    "compressed-tensors": "compressed_tensors",
    "gptq": "gptq",
    "gguf": "gguf",
    "peft": "peft",
}
_WEIGHTS_ALONE = ("gptq", "gguf")


def export(
    folder: str | Path,
    to: str,
    out: str | Path,
    *,
    requantize: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Export:
    """Write a quantized model in another tool's format.

    Args:
        folder: what ``quantlab.quantize`` wrote.
        to: one of :data:`FORMATS`.
        out: the folder (or, for gguf, the file) to write; it must not exist.
        requantize: round layers that the format cannot hold again; otherwise they are refused.
        settings: what else the format lets one choose.

    Raises:
        CheckpointError: no such format or setting, or a layer that the format cannot hold: its name, the reason and the
            remedy. Nothing is left at ``out``.
    """
    if to not in FORMATS:
        raise CheckpointError(f"--to {to!r}: use one of {', '.join(FORMATS)}")
    run: Callable[..., Export] = import_module(f"quantlab.export.{FORMATS[to]}").export
    parameters = set(inspect.signature(run).parameters)
    known = parameters - {"source", "out", "requantize"}
    if unknown := sorted(set(settings or {}) - known):
        raise CheckpointError(f"--set {unknown[0]}: {to} has {', '.join(sorted(known))}")
    if requantize and "requantize" not in parameters:
        raise CheckpointError(f"--requantize: {to} holds nothing that could be rounded again")
    chosen = {**(settings or {}), **({"requantize": True} if requantize else {})}
    source = QuantizedFolder(folder)
    done = run(source, Path(out).expanduser(), **chosen)
    rounds = [storage.activations for storage in source.layers.values() if storage.activations != "none"]
    if to in _WEIGHTS_ALONE and rounds:
        note = (
            f"{to} has no word for activations: that inputs of {len(rounds)} layers are rounded to {rounds[0]} is not "
            "in the file, and whoever reads it multiplies them as it sees fit"
        )
        done = replace(done, notes=(*done.notes, note))
    return done
