"""The GPTQ layout, as AutoGPTQ and GPTQModel write it and many servers read it; versions 1 and 2.

A layer ``M`` of ``in`` inputs and ``out`` outputs becomes ``qweight`` int32 ``[in * bits / 32, out]``, packed along the
inputs; ``qzeros`` int32 ``[groups, out * bits / 32]``, packed along the outputs; ``scales`` float16 ``[groups, out]``;
and ``g_idx`` int32 ``[in]``. Version 1 stores each zero less one, and readers add it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from quantlab_kernels import pack
from torch import nn

from quantlab.checkpoint.adapter import save_adapter
from quantlab.checkpoint.quantized import QuantizedFolder
from quantlab.checkpoint.writer import CheckpointWriter, weight_bytes
from quantlab.errors import CheckpointError
from quantlab.export.base import (
    CannotHoldError,
    Export,
    ExportedLayer,
    Refusals,
    as_words,
    check_biases,
    copy_digest,
    encoded_or_rounded,
    granularity_of,
    integers_of,
    new_folder,
    plain_config,
    rounded_again,
    same_in,
    usual_group,
    write_parts,
)
from quantlab.numerics import QTensor, decode_scales
from quantlab.storage import Storage

_BITS = (2, 3, 4, 8)
# Group sizes that the kernels of GPTQModel (7.7) know; -1: a row.
_GROUPS = {-1, *(2**exponent for exponent in range(4, 11))}
# A layer in a numbered block: where the blocks are, and where it is in one.
_IN_BLOCK = re.compile(r"(.*?)\.\d+\.(.*)")
_REMEDY = "export with --requantize to round such layers again, or to another format"
_Kind = tuple[int, int, bool]
"""Bits, group size (-1: a row), symmetric."""


def export(source: QuantizedFolder, out: Path, *, requantize: bool = False, version: int | None = None) -> Export:
    """Write a quantized model in the GPTQ format.

    Args:
        source: what quantlab wrote.
        out: the folder to write; it must not exist, or be empty.
        requantize: round layers that the format cannot hold again.
        version: 1, which every reader knows, or 2, which can hold a zero of 0; None: 2 for a model with zeros, which
            GPTQModel refuses in version 1 from anyone but itself, and 1 for all others.

    Raises:
        CheckpointError: names the first layer that cannot be held, the reason and the remedy; nothing is left there.
    """
    if version is None:
        version = 2 if any(storage.zero_dtype for storage in source.layers.values()) else 1
    if version not in (1, 2):
        raise CheckpointError(f"--set version={version}: there are versions 1 and 2 of the GPTQ format")
    modules = dict(source.skeleton(unfuse=False).named_modules())
    check_biases(source, modules, "GPTQ")
    refusals = Refusals("GPTQ", _REMEDY)
    for name, storage in source.layers.items():
        if not isinstance(modules.get(name), nn.Linear):
            kind = "one expert of a mixture" if name not in modules else type(modules[name]).__name__
            raise CheckpointError(f"{name}: is {kind}; the GPTQ format holds Linear layers only: leave it unquantized")
        if (reason := _reason_against(storage)) and not requantize:
            refusals.add(name, reason)
    refusals.check()
    usual = usual_group(source.layers.values())
    done: list[ExportedLayer] = []
    kinds: dict[str, _Kind] = {}
    with new_folder(out) as folder:
        writer = CheckpointWriter(folder)

        def encoded(name: str) -> dict[str, torch.Tensor]:
            made, kinds[name], report = _encoded(name, source.layer(name), version, requantize, usual)
            done.append(report)
            return made

        write_parts(writer, source, encoded)
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        described = _config(kinds, linear, version)
        writer.write_json("quantize_config.json", described)
        writer.finish(plain_config(source), described, source.folder)
        notes = _notes(source, folder, out, described, kinds, requantize)
        copy_digest(source.folder, writer, done)
        size = weight_bytes(folder)
    return Export(out, "gptq", tuple(done), size, notes)


def _reason_against(storage: Storage) -> str | None:
    if not storage.format.startswith("int"):
        return f"its codes are no integers ({storage.format})"
    if storage.bits not in _BITS:
        return f"readers know 2, 3, 4 and 8 bits, not {storage.bits}"
    for what, count in (("inputs", storage.in_features), ("outputs", storage.out_features)):
        if count % 32:
            return f"its {count} {what} are not divisible by 32"
    size = granularity_of(storage)
    if isinstance(size, int) and storage.bits == 3 and size % 32:
        return f"3 bits are packed 32 at a time, which groups of {size} cut"
    if storage.zero_dtype not in (None, "int8"):
        return "its zeros are not whole"
    return None


def _encoded(
    name: str, qtensor: QTensor, version: int, requantize: bool, usual: int | None
) -> tuple[dict[str, torch.Tensor], _Kind, ExportedLayer]:
    def again(qtensor: QTensor) -> tuple[dict[str, torch.Tensor], _Kind]:
        size = granularity_of(Storage.of(qtensor))
        bits = next((bits for bits in _BITS if bits >= qtensor.grid.bits), 8)
        return encode(rounded_again(qtensor, bits, "channel" if size == "tensor" else size, "float16"), version)

    (made, kind), note = encoded_or_rounded(
        name,
        qtensor,
        lambda qtensor: encode(qtensor, version),
        again if requantize else None,
        "GPTQ",
        _REMEDY,
    )
    if kind[1] < 0 and qtensor.shape[1] == usual:
        kind = (kind[0], usual, kind[2])
    group = "a row" if kind[1] < 0 else f"group {kind[1]}"
    return made, kind, ExportedLayer(name, f"{kind[0]} bits, {group}", not note, note)


def encode(qtensor: QTensor, version: int = 1) -> tuple[dict[str, torch.Tensor], _Kind]:
    """A layer's tensors, and its bits, group size and symmetry.

    Args:
        qtensor: without a low-rank correction.
        version: of the format.

    Raises:
        CannotHoldError: the format has no place for such a layer.
    """
    storage = Storage.of(qtensor)
    if reason := _reason_against(storage):
        raise CannotHoldError(reason)
    bits, half, less = storage.bits, 2 ** (storage.bits - 1), int(version == 1)
    rows, columns = qtensor.shape
    scales = decode_scales(qtensor.scales, qtensor.outer)
    if not same_in(scales, torch.float16):
        raise CannotHoldError(f"its scales ({qtensor.scales.dtype}) are no float16 numbers, which the format has")
    scales = scales.expand(rows, -1)
    groups = scales.shape[1]
    integers = integers_of(qtensor)
    assert integers is not None
    zeros = torch.full((rows, groups), half)
    if qtensor.zeros is not None:
        zeros = qtensor.zeros.int().expand(rows, groups) + half
    if version == 1 and int(zeros.min()) < 1:
        raise CannotHoldError("it has a zero of 0, which version 1 cannot store; use --set version=2")
    if int(zeros.max()) - less >= 2**bits or int(zeros.min()) < 0:
        raise CannotHoldError("a zero lies outside of the codes' range")
    tensors = {
        "qweight": _words((integers + half).T, bits, along_rows=True),
        "qzeros": _words((zeros - less).T, bits, along_rows=False),
        "scales": scales.T.to(torch.float16).contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups),
    }
    return tensors, (bits, -1 if groups == 1 else columns // groups, qtensor.zeros is None)


def _words(codes: torch.Tensor, bits: int, *, along_rows: bool) -> torch.Tensor:
    """Codes ``[rows, columns]`` packed into int32 words along rows (the first axis) or along columns."""
    codes = codes.T if along_rows else codes
    words = as_words(pack(codes, bits))
    return words.T.contiguous() if along_rows else words


def _config(kinds: dict[str, _Kind], linear: list[str], version: int) -> dict[str, Any]:
    """The format's configuration: the commonest kind for all, and exceptions by name."""
    (bits, size, symmetric), _ = Counter(kinds.values()).most_common(1)[0]
    exceptions: dict[str, dict[str, Any]] = {}
    for name, kind in kinds.items():
        if kind != (bits, size, symmetric):
            exceptions[f"+:^{re.escape(name)}$"] = {"bits": kind[0], "group_size": kind[1], "sym": kind[2]}
    for name in linear:
        if name not in kinds and name != "lm_head":
            exceptions[f"-:^{re.escape(name)}$"] = {}
    name = "gptq" if version == 1 else "gptq_v2"
    return {
        "quant_method": "gptq",
        "method": "gptq",
        "checkpoint_format": name,
        "format": name,
        "bits": bits,
        "group_size": size,
        "desc_act": False,
        "sym": symmetric,
        "lm_head": "lm_head" in kinds,
        "pack_dtype": "int32",
        "damp_percent": 0.01,
        "static_groups": False,
        "true_sequential": True,
        "meta": {"quantizer": ["quantlab"]},
        **({"dynamic": exceptions} if exceptions else {}),
        **_inside_blocks(kinds, linear),
    }


def _inside_blocks(kinds: Iterable[str], linear: list[str]) -> dict[str, Any]:
    """Where transformers is to look for quantized layers, which takes every Linear of the blocks otherwise.

    A layer is named by its place in a block; by all of its name, if it stays as it is in another block.
    """
    placed = {name: match.groups() for name in linear if (match := _IN_BLOCK.fullmatch(name))}
    quantized = [name for name in kinds if name in placed]
    stems = {placed[name][0] for name in quantized}
    if len(stems) != 1:
        return {}
    kept = {placed[name][1] for name in placed.keys() - set(quantized) if placed[name][0] in stems}
    if not kept:
        return {"block_name_to_quantize": stems.pop()}
    names = dict.fromkeys(name if placed[name][1] in kept else placed[name][1] for name in quantized)
    return {"block_name_to_quantize": stems.pop(), "modules_in_block_to_quantize": [[name] for name in names]}


def _notes(
    source: QuantizedFolder,
    folder: Path,
    out: Path,
    described: dict[str, Any],
    kinds: dict[str, _Kind],
    requantize: bool,
) -> tuple[str, ...]:
    notes = []
    if any(pattern.startswith("+") for pattern in described.get("dynamic", {})):
        notes.append("layers differ, which GPTQModel and vLLM read (`dynamic`) and transformers ignores")
    if outside := [name for name in kinds if not _IN_BLOCK.fullmatch(name)]:
        notes.append(f"{', '.join(outside)}: quantized outside of the blocks, where transformers does not look")
    if unknown := sorted({kind[1] for kind in kinds.values()} - _GROUPS):
        notes.append(f"groups of {', '.join(map(str, unknown))}: GPTQModel refuses them")
    if described["checkpoint_format"] == "gptq" and not described["sym"]:
        notes.append("zeros in version 1, which GPTQModel refuses from anyone but itself")
    if not requantize and any(storage.low_rank for storage in source.layers.values()):
        save_adapter(source.folder, folder / "adapter", str(out))
        notes.append(f"the low-rank corrections are a PEFT adapter, in {out / 'adapter'}")
    return tuple(notes)
