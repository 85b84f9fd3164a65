"""quantlab's own checkpoint format: what a layer's tensors are called, and how config.json describes them.

A quantized layer ``name`` is stored as ``name.codes`` (packed), ``name.scales``, ``name.table`` and, where it has them,
``name.zeros``, ``name.low_rank_left``, ``name.low_rank_right``, ``name.low_rank_scales``, ``name.outer_scales``,
``name.outer_offset`` and ``name.bias``. Names are the model's own, as transformers builds it, but for a mixture's
experts, which are apart; no key is ever renamed.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from quantlab.errors import CheckpointError, QuantlabError, RecipeError
from quantlab.numerics import QTensor, grid
from quantlab.storage import Storage, packed_tensors, unpacked

QUANT_METHOD = "quantlab"
FORMAT_VERSION = 1


def layer_tensors(name: str, qtensor: QTensor) -> dict[str, torch.Tensor]:
    """The tensors that store the layer's weight, by the names that they have in the checkpoint."""
    return {f"{name}.{key}": tensor for key, tensor in packed_tensors(qtensor).items()}


def read_layer(tensors: Mapping[str, torch.Tensor], name: str, storage: Storage) -> QTensor:
    """Undo :func:`layer_tensors`.

    Raises:
        CheckpointError: a tensor is missing, has another shape or dtype than ``storage`` says, or holds codes
            or a table that cannot be right.
    """
    stored = {}
    for key, (shape, dtype) in storage.specs().items():
        tensor = tensors.get(f"{name}.{key}")
        if tensor is None:
            raise CheckpointError(f"{name}: the checkpoint has no tensor {name}.{key}; it was not written completely")
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise CheckpointError(
                f"{name}.{key}: the checkpoint has {tensor.dtype} {list(tensor.shape)}, "
                f"its config.json says {dtype} {list(shape)}; the two do not belong together"
            )
        stored[key] = tensor
    check_table(name, storage, stored["table"])
    qtensor = unpacked(stored, storage)
    if qtensor.codes.numel() and int(qtensor.codes.max()) >= storage.table_size:
        raise CheckpointError(
            f"{name}.codes: code {int(qtensor.codes.max())} is beyond its {storage.table_size} values"
        )
    return qtensor


def check_table(name: str, storage: Storage, table: torch.Tensor) -> None:
    """Refuse a stored table that is not the one that quantlab knows by its format's name.

    Raises:
        CheckpointError: they differ.
    """
    try:
        known = grid(storage.format)
    except RecipeError:
        return  # a format with a table of its own
    # Powers and quantiles may differ in their last bits from one machine to the next.
    same = known.bits == storage.bits and known.values.shape == table.shape
    if not same or not torch.allclose(known.values, table.cpu(), rtol=1e-5, atol=0):
        raise CheckpointError(
            f"{name}.table: the checkpoint's table for {storage.format} is not quantlab's; the file is"
            " damaged, or a quantlab that means something else by this name wrote it"
        )


def quantization_config(layers: Mapping[str, Storage]) -> dict[str, Any]:
    """What config.json says of a model whose ``layers`` are quantized; layers stored alike stand together."""
    groups: dict[Storage, list[str]] = {}
    for name in sorted(layers):
        groups.setdefault(layers[name], []).append(name)
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "quantlab_version": metadata.version("quantlab"),
        "layers": [{**storage.to_dict(), "layers": names} for storage, names in groups.items()],
    }


def parse_quantization_config(config: Mapping[str, Any]) -> dict[str, Storage]:
    """Undo :func:`quantization_config`.

    Raises:
        CheckpointError: another method's config, a newer format, or a description that cannot be read.
    """
    if config.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"quant_method {config.get('quant_method')!r} is not {QUANT_METHOD!r}")
    version = config.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"format_version {version!r}: expected a number from 1 to {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        writer = config.get("quantlab_version", "unknown")
        raise CheckpointError(
            f"the checkpoint has format version {version}, written by quantlab {writer}; this quantlab reads "
            f"up to version {FORMAT_VERSION}; upgrade it: pip install -U quantlab"
        )
    layers: dict[str, Storage] = {}
    for group in config.get("layers") or []:
        try:
            storage = Storage.from_dict({key: value for key, value in group.items() if key != "layers"})
            layers |= dict.fromkeys(group["layers"], storage)
        except (QuantlabError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"quantization_config.layers cannot be read: {error}") from error
    return layers
