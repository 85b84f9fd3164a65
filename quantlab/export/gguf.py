"""GGUF: one file with weights, sizes and tokenizer, for llama.cpp and what is built on it.

Codes stay what they are where a block type has their grid: integers under float16 scales for multiples of 32 weights,
other formats whose values are whole multiples of a step (e2m1 has them, nf4 has not), MXFP4. A wider block is taken
rather than a rounding: 3-bit codes lie in Q4_0 unless Q3_K holds them exactly. What no block holds is refused, or
rounded again by a search when that is asked for.
"""

from __future__ import annotations

import fnmatch
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoTokenizer

from quantlab.checkpoint.quantized import INEXACT, QuantizedFolder
from quantlab.checkpoint.source import open_source
from quantlab.errors import CheckpointError
from quantlab.export.base import CannotHoldError, Export, ExportedLayer
from quantlab.export.gguf_assumed import check_assumed
from quantlab.export.gguf_exact import exact_blocks
from quantlab.export.gguf_model import add_metadata, layout_of, row_order, tensor_names
from quantlab.export.gguf_search import TYPES, quantized_blocks
from quantlab.export.gguf_tokenizer import add_tokenizer
from quantlab.export.importance import check_untransformed, importance_of
from quantlab.numerics import LowRank, QTensor

_REMEDY = (
    "export with --requantize to round such layers again (--set types={'model.layers.*': q4_k} says to what), or "
    "quantize the original with a recipe whose grid GGUF has (int4 in groups of 32 or 64)"
)
# What is tried for a layer that must be rounded again, by bits of its format.
_AGAIN = {1: "q2_k", 2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k", 7: "q8_0", 8: "q8_0"}
_WITHOUT_SUPER = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q4_0", "q5_k": "q5_0", "q6_k": "q8_0"}
_DENSE = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_FILE_TYPES = {
    **{"bf16": "BF16", "f16": "F16"},
    **{kind: kind.upper() for kind in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q6_k")},
    **{"q3_k": "Q3_K_M", "q4_k": "Q4_K_M", "q5_k": "Q5_K_M", "mxfp4": "MXFP4_MOE"},
}


def export(
    source: QuantizedFolder,
    out: Path,
    *,
    requantize: bool = False,
    types: Mapping[str, str] | None = None,
    original: str | None = None,
    importance: str | None = None,
    pre: str | None = None,
) -> Export:
    """Write a quantized model as a GGUF file.

    Args:
        source: what quantlab wrote.
        out: the file to write; it must not exist.
        requantize: round layers that no block type holds again.
        types: block types by pattern of names (``{"*.down_proj": "q6_k"}``, the last that matches wins): these are
            rounded again, or for the first time where an ``original`` is given. Embeddings and heads can be named, too.
        original: the model's folder before it was quantized, to round those from.
        importance: a safetensors file with the second moment of each layer's inputs, ``[in]`` by layer name, or
            ``measure``: the original runs over the calibration data of the folder's recipe.
        pre: what llama.cpp calls the tokenizer's way of cutting text into words, where it is not recognized.

    Raises:
        CheckpointError: an architecture, tokenizer or layer that GGUF, or quantlab, has no place for: the first, with
            reason and remedy. Nothing is left at ``out``.
    """
    if out.suffix != ".gguf":
        raise CheckpointError(f"--out {out}: a GGUF file's name ends in .gguf")
    if out.exists():
        raise CheckpointError(f"{out}: exists already; choose another --out")
    for kind in (types or {}).values():
        if kind not in TYPES and kind not in _DENSE:
            raise CheckpointError(f"--set types: {kind!r} is none of {', '.join([*TYPES, *_DENSE])}")
    plan = _Plan(source, requantize, types or {}, original, importance)
    partial = out.absolute().with_name(f"{out.name}.{os.getpid()}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(partial), plan.layout.architecture, use_temp_file=True)
    try:
        add_metadata(writer, plan.layout, plan.config, out.stem)
        add_tokenizer(writer, _tokenizer(source.folder), plan.config.vocab_size, pre)
        done = plan.write(writer)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(_file_type(done))
        if plan.inexact:
            writer.add_uint32(f"quantlab.{INEXACT}", plan.inexact)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return Export(out, "gguf", tuple(done), out.stat().st_size, plan.notes)


class _Plan:
    """One model on its way into a file.

    Attributes:
        notes: what a person should know.
        inexact: tensors so far that are not what they were.
    """

    def __init__(
        self,
        source: QuantizedFolder,
        requantize: bool,
        types: Mapping[str, str],
        original: str | None,
        importance: str | None,
    ) -> None:
        self.source, self.requantize, self.types = source, requantize, types
        self.config = source.original_config()
        self.layout = layout_of(self.config)
        names = [f"{name}.weight" for name in source.layers] + source.kept
        self.names = tensor_names(self.layout, self.config.num_hidden_layers, names)
        self.notes = check_assumed(self.layout, self.config, self.names)
        if original is not None:
            check_untransformed(source)
        self.original = None if original is None else open_source(Path(original).expanduser())
        self.skeleton = None if self.original is None else self.original.skeleton()
        self.importance = importance_of(source, importance, original)
        self.inexact = 0

    def write(self, writer: gguf.GGUFWriter) -> list[ExportedLayer]:
        """Add every tensor; what became of the quantized layers."""
        done = []
        for layers, kept in self.source.parts():
            for name in kept:
                self._add_kept(writer, name)
            for name in layers:
                data, kind, report = self._layer(name)
                self._add(writer, f"{name}.weight", data, kind)
                done.append(report)
                self.inexact += not report.exact
        return done

    def _layer(self, name: str) -> tuple[torch.Tensor, str, ExportedLayer]:
        qtensor, wanted = self.source.layer(name), self._wanted(name)
        order = row_order(self.layout, self.config, f"{name}.weight", qtensor.shape[0])
        qtensor = qtensor if order is None else _reordered(qtensor, order)
        reason = f"rounded again: asked for {wanted}" if wanted else ""
        if not wanted:
            try:
                data, kind = exact_blocks(qtensor)
                return data, kind, ExportedLayer(name, kind.upper())
            except CannotHoldError as error:
                if not self.requantize:
                    raise CheckpointError(f"{name}: GGUF cannot hold it as it is: {error}; {_REMEDY}") from error
                wanted, reason = _AGAIN[qtensor.grid.bits], f"rounded again: {error}"
        weight = qtensor.dequantize()
        if self.original is not None:
            weight, reason = self._original(name, order), f"rounded from the original to {wanted}"
        elif wanted in _DENSE:
            reason = f"decoded, to {wanted}" if wanted != "f32" else ""
        kind = self._fitting(name, wanted, weight.shape[1])
        data = self._made(name, weight, kind)
        return data, kind, ExportedLayer(name, kind.upper(), not reason, reason)

    def _wanted(self, name: str) -> str | None:
        """The type that was asked for a layer: the last pattern's that matches."""
        return next((self.types[p] for p in reversed(list(self.types)) if fnmatch.fnmatchcase(name, p)), None)

    def _fitting(self, name: str, kind: str, columns: int) -> str:
        """The type, or one of blocks of 32 where a row is not whole blocks of 256."""
        if kind in _DENSE:
            return kind
        if columns % TYPES[kind][1]:
            kind = _WITHOUT_SUPER.get(kind, kind)
        if columns % TYPES[kind][1]:
            raise CheckpointError(f"{name}: its rows of {columns} are not whole blocks of 32, which {kind} has")
        return kind

    def _original(self, name: str, order: torch.Tensor | None) -> torch.Tensor:
        assert self.original is not None
        assert self.skeleton is not None
        self.original.load(self.skeleton, name)
        weight = self.skeleton.get_parameter(f"{name}.weight").detach().float()
        self.original.unload(self.skeleton, name)
        return weight if order is None else weight[order]

    def _add_kept(self, writer: gguf.GGUFWriter, name: str) -> None:
        tensor = self.source.files.read(name)
        order = row_order(self.layout, self.config, name, tensor.shape[0])
        tensor = tensor if order is None else tensor[order]
        if tensor.ndim == 1:
            plus = 1.0 if self.layout.norms_plus_one and name.endswith("norm.weight") else 0.0
            self._add(writer, name, tensor.float() + plus, "f32")
            return
        stem = name.removesuffix(".weight")
        wanted = self._wanted(stem) if tensor.ndim == 2 else None
        if wanted:
            kind = self._fitting(name, wanted, tensor.shape[1])
            self._add(writer, name, self._made(stem, tensor.float(), kind), kind)
            self.inexact += kind != "f32" and _DENSE.get(kind) != tensor.dtype
            return
        kind = next((kind for kind, dtype in _DENSE.items() if dtype == tensor.dtype), "f32")
        self._add(writer, name, self._made(name, tensor, kind), kind)

    def _made(self, name: str, weight: torch.Tensor, kind: str) -> torch.Tensor:
        """A weight as the file holds it in this type."""
        if kind in _DENSE:
            dense = weight.to(_DENSE[kind])
            return dense.view(torch.uint8) if kind == "bf16" else dense
        return quantized_blocks(weight, kind, self.importance.get(name))

    def _add(self, writer: gguf.GGUFWriter, name: str, data: torch.Tensor, kind: str) -> None:
        array = np.ascontiguousarray(data.numpy())
        writer.add_tensor(self.names[name], array, raw_dtype=gguf.GGMLQuantizationType[kind.upper()])


def _reordered(qtensor: QTensor, order: torch.Tensor) -> QTensor:
    """The same weight with its rows in another order."""

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[order] if len(tensor) == len(order) else tensor  # one scale for all has no order

    if qtensor.outer is not None and qtensor.outer.scales.numel() > 1:
        raise CheckpointError("scales of two levels that rows share cannot be reordered; use another scale_dtype")
    zeros = None if qtensor.zeros is None else rows(qtensor.zeros)
    low_rank = qtensor.low_rank
    if low_rank is not None:
        low_rank = LowRank(low_rank.left[order], low_rank.right, low_rank.scales)
    return QTensor(qtensor.codes[order], rows(qtensor.scales), zeros, qtensor.grid, low_rank, qtensor.outer)


def _tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be loaded ({reason}); a GGUF file holds one: put its files there"
        ) from error


def _file_type(done: list[ExportedLayer]) -> int:
    """What the file calls itself: the commonest type of the quantized layers."""
    (kind, _), *_ = Counter(layer.stored.lower() for layer in done).most_common()
    return int(gguf.LlamaFileType.ALL_F32 if kind == "f32" else gguf.LlamaFileType[f"MOSTLY_{_FILE_TYPES[kind]}"])
