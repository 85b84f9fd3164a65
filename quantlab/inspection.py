"""What is in a folder that quantlab wrote, layer by layer: from its headers and its log, not its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from quantlab.checkpoint.native import QUANT_METHOD, parse_quantization_config
from quantlab.checkpoint.writer import INDEX, read_header
from quantlab.engine.journal import LOG
from quantlab.engine.quantize import RECIPE
from quantlab.engine.report import LayerReport
from quantlab.errors import CheckpointError
from quantlab.storage import Storage

Header = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class InspectedLayer:
    """A quantized layer, as it lies in the files.

    Attributes:
        layer: its full name.
        format: its grid.
        granularity: what shares a scale: a group size, ``"channel"`` or ``"tensor"``.
        shape: ``(out_features, in_features)``.
        bits: bits a weight, everything stored counted: codes, scales, zeros, table, low-rank factors.
        bytes: the same, in bytes.
        scale_dtype: how scales are stored, as a recipe calls it; empty without a log.
        compensation: the method that repaired what error was left; ``"none"`` without a log.
        activations: what its inputs are rounded to when it runs, or ``"none"``.
        quantizer: the method that chose the codes; None without a log, like all that follows.
        error: relative error, as in :class:`~quantlab.engine.report.LayerReport`.
        metric: what the error is of: the layer's "output", its "weight", or its "weighted" weight.
        tokens: calibration tokens that it saw.
        notes: what a person should know.
    """

    layer: str
    format: str
    granularity: int | str
    shape: tuple[int, int]
    bits: float
    bytes: int
    scale_dtype: str = ""
    compensation: str = "none"
    activations: str = "none"
    quantizer: str | None = None
    error: float | None = None
    metric: str | None = None
    tokens: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """How many weights the layer has."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that is stored as it was: an embedding, a norm, a bias, a layer that the recipe left alone."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def weights(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Inspection:
    """A quantized checkpoint.

    Attributes:
        folder: where it is.
        architecture: the model's class.
        recipe: as it was carried out; None if the folder has none.
        run: versions, calibration data and the original's fingerprint; empty without a log.
        layers: the quantized layers: in the order in which they were done, or by name without a log.
        kept: every other tensor, by name.
        bytes_on_disk: of the weight files, headers included.
    """

    folder: Path
    architecture: str
    recipe: dict[str, Any] | None
    run: dict[str, Any]
    layers: tuple[InspectedLayer, ...]
    kept: tuple[KeptTensor, ...]
    bytes_on_disk: int

    @property
    def bytes_quantized(self) -> int:
        """Bytes of the quantized layers, everything stored counted."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def bytes_kept(self) -> int:
        """Bytes of all other tensors."""
        return sum(tensor.bytes for tensor in self.kept)

    @property
    def weights_quantized(self) -> int:
        """How many weights are quantized."""
        return sum(layer.weights for layer in self.layers)

    @property
    def weights(self) -> int:
        """How many weights the model has, quantized or not; a tied head is counted once."""
        return self.weights_quantized + sum(tensor.weights for tensor in self.kept)

    @property
    def bits(self) -> float:
        """Bits a weight over the quantized layers, everything stored counted."""
        return 8 * self.bytes_quantized / max(1, self.weights_quantized)

    @property
    def bits_of_model(self) -> float:
        """Bits a weight over the whole model: embeddings, head and norms included."""
        return 8 * (self.bytes_quantized + self.bytes_kept) / max(1, self.weights)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able mapping of everything, totals included."""
        totals = ("bits", "bits_of_model", "weights", "weights_quantized", "bytes_quantized", "bytes_kept")
        return {
            **asdict(self),
            "folder": str(self.folder),
            "totals": {**{name: getattr(self, name) for name in totals}, "bytes_on_disk": self.bytes_on_disk},
        }


def inspect(folder: str | Path) -> Inspection:
    """Look into a folder that quantlab wrote.

    Reads ``config.json``, the headers of the weight files, ``run.jsonl`` and ``recipe.yaml``; the last two
    may be missing, and with them goes what only they say (errors, methods, notes).

    Raises:
        CheckpointError: not such a folder, not complete, or its parts do not belong together.
    """
    folder = Path(folder).expanduser()
    config = _config(folder)
    storages = parse_quantization_config(config["quantization_config"])
    files = _weight_files(folder)
    header = {name: entry for file in files for name, entry in read_header(file)[0].items()}
    run, reports = _log(folder / LOG)
    order = [name for name in reports if name in storages] or sorted(storages)
    order += sorted(storages.keys() - set(order))
    layers = tuple(_layer(name, storages[name], header, reports.get(name)) for name in order)
    stored = {f"{name}.{key}" for name, storage in storages.items() for key in storage.specs()}
    kept = tuple(
        KeptTensor(name, entry["dtype"], tuple(entry["shape"]), _bytes(entry))
        for name, entry in sorted(header.items())
        if name not in stored
    )
    return Inspection(
        folder=folder,
        architecture=(config.get("architectures") or [config.get("model_type", "unknown")])[0],
        recipe=_recipe(folder / RECIPE),
        run=run,
        layers=layers,
        kept=kept,
        bytes_on_disk=sum(file.stat().st_size for file in files),
    )


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder}: {what}; give the folder that `quantlab quantize --out` wrote")
    if not file.is_file():
        if (folder / LOG).is_file():
            raise CheckpointError(
                f"{folder}: holds an interrupted run; repeat its `quantlab quantize` command to complete it"
            )
        raise CheckpointError(f"{folder}: a folder without config.json is not a Hugging Face model")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        method = (config.get("quantization_config") or {}).get("quant_method")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if method != QUANT_METHOD:
        state = "is not quantized" if method is None else f"was quantized by another tool (quant_method {method!r})"
        raise CheckpointError(
            f"{folder}: this model {state}; inspect takes a folder that `quantlab quantize --out` wrote"
        )
    return config


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index}: cannot be read: {error}") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder}: weight files are missing: {', '.join(missing)}; copy the whole folder")
    return [folder / name for name in names]


def _log(file: Path) -> tuple[dict[str, Any], dict[str, LayerReport]]:
    """What the log says of the run, and of each layer."""
    if not file.is_file():
        return {}, {}
    run: dict[str, Any] = {}
    reports: dict[str, LayerReport] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            if record["kind"] == "run":
                run = {key: value for key, value in record.items() if key not in ("kind", "recipe")}
            elif record["kind"] == "layer":
                reports[record["layer"]] = LayerReport.from_record(record)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file}, line {number}: cannot be read: {error}") from error
    return run, reports


def _recipe(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise CheckpointError(f"{file}: is not valid YAML: {' '.join(str(error).split())}") from error


def _layer(name: str, storage: Storage, header: Header, report: LayerReport | None) -> InspectedLayer:
    entries = {key: header.get(f"{name}.{key}") for key in storage.specs()}
    if missing := [f"{name}.{key}" for key, entry in entries.items() if entry is None]:
        raise CheckpointError(f"{name}: no weight file has {', '.join(missing)}; the folder is not complete")
    stored = sum(_bytes(entry) for entry in entries.values() if entry is not None)
    shape = (storage.out_features, storage.in_features)
    return InspectedLayer(
        layer=name,
        format=storage.format,
        granularity=report.granularity if report else _granularity(storage),
        shape=shape,
        bits=8 * stored / (shape[0] * shape[1]),
        bytes=stored,
        scale_dtype=report.scale_dtype if report else "",
        compensation=report.compensation if report else "none",
        activations=storage.activations,
        quantizer=report.quantizer if report else None,
        error=report.error if report else None,
        metric=report.metric if report else None,
        tokens=report.tokens if report else None,
        notes=report.notes if report else (),
    )


def _granularity(storage: Storage) -> int | str:
    rows, groups = storage.scale_shape
    if groups > 1:
        return storage.in_features // groups
    return "channel" if rows > 1 else "tensor"


def _bytes(entry: Mapping[str, Any]) -> int:
    start, end = entry["data_offsets"]
    return end - start
