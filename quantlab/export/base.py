"""What every export has in common: what is asked for, what a layer became, what was refused and why."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from quantlab.checkpoint.quantized import DIGEST, INEXACT, QuantizedFolder
from quantlab.checkpoint.writer import CheckpointWriter, shard_name
from quantlab.errors import CheckpointError
from quantlab.numerics import Grid, QTensor, apply_scales, choose_scales, grid
from quantlab.storage import Storage

Encoded = TypeVar("Encoded")

# Layers that servers run as one product, by the last part of their names.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


class CannotHoldError(CheckpointError):
    """A layer that a format has no way to hold as it is; the message is the reason alone."""


@dataclass(frozen=True)
class ExportedLayer:
    """What became of one layer.

    Attributes:
        layer: its full name.
        stored: how the format calls what it is stored as.
        exact: whether the new file decodes to the very weight that the codes stood for.
        note: why it does not; empty if it does.
    """

    layer: str
    stored: str
    exact: bool = True
    note: str = ""


@dataclass(frozen=True)
class Export:
    """A model in another format.

    Attributes:
        path: the folder, or the file.
        format: as it was asked for.
        layers: every quantized layer of the model.
        bytes: of the new weights.
        notes: what a person should know.
    """

    path: Path
    format: str
    layers: tuple[ExportedLayer, ...]
    bytes: int
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every layer decodes to the very same weight."""
        return all(layer.exact for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able mapping."""
        return {
            "path": str(self.path),
            "format": self.format,
            "exact": self.exact,
            "bytes": self.bytes,
            "notes": list(self.notes),
            "layers": [
                {"layer": layer.layer, "stored": layer.stored, "exact": layer.exact, "note": layer.note}
                for layer in self.layers
            ],
        }


@dataclass
class Refusals:
    """Layers that cannot be held, told together: the first with its reason, and how many more there are."""

    format: str
    remedy: str
    found: list[tuple[str, str]] = field(default_factory=list)

    def add(self, layer: str, reason: str) -> None:
        """Remember one."""
        self.found.append((layer, reason))

    def check(self) -> None:
        """Raise a CheckpointError if there are any."""
        if self.found:
            layer, reason = self.found[0]
            more = f" (and {len(self.found) - 1} more layers)" if len(self.found) > 1 else ""
            raise _refused(f"{layer}{more}", reason, self.format, self.remedy)


def _refused(layer: str, reason: str, format: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"{layer}: {format} cannot hold it as it is: {reason}; {remedy}")


def usual_group(storages: Iterable[Storage]) -> int | None:
    """The group size of most layers, if they have groups."""
    sizes = Counter(s.in_features // s.scale_shape[1] for s in storages if s.scale_shape[1] > 1)
    return sizes.most_common(1)[0][0] if sizes else None


def granularity_of(storage: Storage, usual: int | None = None) -> int | str:
    """What shares a scale in a stored layer: a group size, ``"channel"`` or ``"tensor"``.

    Args:
        storage: of the layer.
        usual: the group size of its neighbours: a layer as wide as that has groups, too.
    """
    rows, groups = storage.scale_shape
    if groups > 1 or (rows == storage.out_features and storage.in_features == usual):
        return storage.in_features // groups
    return "tensor" if rows == 1 and storage.out_features > 1 else "channel"


def integers_of(qtensor: QTensor) -> torch.Tensor | None:
    """What the codes of an integer format stand for, int16 ``[out, in]``; None for other formats."""
    if not qtensor.grid.is_integer:
        return None
    return qtensor.codes.to(torch.int16) + int(qtensor.grid.lowest)


def same_in(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether all these float32 numbers are numbers of ``dtype``."""
    return bool(torch.equal(values.to(dtype).float(), values.float()))


def sign_and_magnitude(grid: Grid) -> torch.Tensor:
    """A minifloat's bit patterns in code order, int16: a sign above the rank of the magnitude among all magnitudes."""
    values = grid.values
    ranks = torch.searchsorted(values[values >= 0], values.abs())
    return (ranks + (values < 0) * 2 ** (grid.bits - 1)).to(torch.int16)


def as_words(packed: torch.Tensor) -> torch.Tensor:
    """Rows of bytes, a multiple of 4 of them, as int32."""
    return packed.flatten().view(torch.int32).view(len(packed), -1)


def rounded_again(
    qtensor: QTensor, bits: int, size: int | str, stored: str, importance: torch.Tensor | None = None
) -> QTensor:
    """The decoded weight, correction included, rounded to symmetric integers: what is done when codes cannot stay."""
    weight, table = qtensor.dequantize(), grid(f"int{bits}")
    scales = choose_scales(weight, table, size, importance=importance, stored=stored)
    return QTensor.of(apply_scales(weight, table, scales), scales, table)


def encoded_or_rounded(
    name: str,
    qtensor: QTensor,
    encode: Callable[[QTensor], Encoded],
    round_again: Callable[[QTensor], Encoded] | None,
    format: str,
    remedy: str,
) -> tuple[Encoded, str]:
    """What a format makes of a layer, and what that lost; empty if nothing.

    Args:
        name: of the layer.
        qtensor: its weight; a low-rank correction is left out, for the adapter, unless all of it is rounded again.
        encode: given a weight without a correction; raises CannotHoldError.
        round_again: given the weight where that cannot be; None: the layer is refused.
        format: what it is called.
        remedy: for a layer that is refused.

    Raises:
        CheckpointError: the layer is refused.
    """
    note = ""
    if qtensor.low_rank is not None and round_again is None:
        qtensor, note = replace(qtensor, low_rank=None), "without its low-rank correction, which is in adapter/"
    try:
        if qtensor.low_rank is not None:
            raise CannotHoldError("it has a low-rank correction")
        return encode(qtensor), note
    except CannotHoldError as error:
        if round_again is None:
            raise _refused(name, str(error), format, remedy) from error
        return round_again(qtensor), f"rounded again: {error}"


def fused_sets(names: Iterable[str]) -> list[list[str]]:
    """The layers among ``names`` that servers run as one: q, k and v, gate and up."""
    sets: dict[tuple[str, int], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        for index, members in enumerate(FUSED):
            if leaf in members:
                sets.setdefault((parent, index), []).append(name)
    return [members for members in sets.values() if len(members) > 1]


def check_biases(source: QuantizedFolder, modules: Mapping[str, nn.Module], format: str) -> None:
    """Refuse biases that a compensation added to layers without: readers build a model from its config.json.

    Raises:
        CheckpointError: names the first.
    """
    kept = set(source.kept)
    added = [
        name
        for name in source.layers
        if f"{name}.bias" in kept and name in modules and getattr(modules[name], "bias", None) is None
    ]
    if added:
        raise CheckpointError(
            f"{added[0]}.bias (of {len(added)} such): was added when the model was quantized, which has none there; "
            f"who loads {format} builds the model from config.json, without it, and leaves it out; use the folder "
            "itself with quantlab, or quantize without a compensation that adds biases"
        )


def copy_digest(source: Path, writer: CheckpointWriter, layers: Iterable[ExportedLayer]) -> None:
    """Take along what the model said of a few prompts, where that is known, and how many layers say something else."""
    known = json.loads((source / DIGEST).read_text(encoding="utf-8")) if (source / DIGEST).is_file() else {}
    if inexact := sum(not layer.exact for layer in layers):
        known[INEXACT] = inexact
    if known:
        writer.write_json(DIGEST, known)


def write_parts(
    writer: CheckpointWriter, source: QuantizedFolder, encoded: Callable[[str], Mapping[str, torch.Tensor]]
) -> None:
    """Write a model's shards: what is kept as it is, and of each layer the tensors that ``encoded`` makes of it."""
    parts = list(source.parts())
    for index, (layers, kept) in enumerate(parts, 1):
        tensors = {name: source.files.read(name) for name in kept}
        for name in layers:
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in encoded(name).items()}
        writer.write(shard_name(index, len(parts)), tensors)


def plain_config(source: QuantizedFolder) -> dict[str, Any]:
    """The model's config without a word of how we store it."""
    return {key: value for key, value in source.config.items() if key != "quantization_config"}


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to write into, which becomes ``out`` when all went well and is removed otherwise.

    Raises:
        CheckpointError: there is something at ``out``, or it cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists already; choose another --out")
    partial = out.absolute().with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be made a folder ({error})") from error
    try:
        yield partial
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
