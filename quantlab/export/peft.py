"""The low-rank corrections alone, as an adapter that PEFT loads onto a model of the same codes."""

from __future__ import annotations

from pathlib import Path

from quantlab.checkpoint.adapter import ADAPTER, save_adapter
from quantlab.checkpoint.quantized import QuantizedFolder
from quantlab.export.base import Export, ExportedLayer


def export(source: QuantizedFolder, out: Path, *, base: str | None = None) -> Export:
    """Write the corrections as a PEFT adapter; see :func:`quantlab.checkpoint.adapter.save_adapter`.

    Args:
        source: what quantlab wrote.
        out: the folder to write; it must not exist, or be empty.
        base: the name or folder of the model that the adapter is for.

    Raises:
        CheckpointError: there are no corrections, or ``out`` cannot be written.
    """
    save_adapter(source.folder, out, base)
    ranks = {name: storage.low_rank for name, storage in source.layers.items() if storage.low_rank}
    layers = tuple(ExportedLayer(name, f"LoRA of rank {rank}") for name, rank in ranks.items())
    return Export(out, "peft", layers, (out / ADAPTER).stat().st_size)
