"""compressed-tensors: what vLLM and plain ``AutoModelForCausalLM.from_pretrained`` load.

A layer ``M`` becomes ``M.weight_packed`` (or ``M.weight``), ``M.weight_scale`` and what its scheme has besides; the
schemes, with the layers that they are for, stand in config.json. Layouts: those of the library's version 0.20 (dense
bit streams for widths that do not divide 32).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from quantlab_kernels import pack
from torch import nn

from quantlab.checkpoint.adapter import save_adapter
from quantlab.checkpoint.quantized import QuantizedFolder
from quantlab.checkpoint.writer import CheckpointWriter, shard_name
from quantlab.errors import CheckpointError
from quantlab.export.base import (
    CannotHoldError,
    Export,
    ExportedLayer,
    Refusals,
    as_words,
    copy_digest,
    fused_sets,
    granularity_of,
    integers_of,
    new_folder,
    rounded_again,
    same_in,
    usual_group,
)
from quantlab.nn import Storage
from quantlab.numerics import OuterScales, QTensor, Scales, apply_scales, decode_scales, scale_type

_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
# Formats of floating-point codes, by table, group and stored scales: what compressed-tensors calls them, bits.
_FLOATS: dict[tuple[str, int | str, str], tuple[str, int]] = {
    ("e2m1", 16, "float8_e4m3fn"): ("nvfp4-pack-quantized", 4),
    ("e2m1", 32, "float8_e8m0fnu"): ("mxfp4-pack-quantized", 4),
    ("e2m3", 32, "float8_e8m0fnu"): ("mxfp6-pack-quantized", 6),
    ("e4m3", 32, "float8_e8m0fnu"): ("mxfp8-quantized", 8),
    **{("e4m3", size, dtype): ("float-quantized", 8) for size in ("channel", "tensor") for dtype in _DTYPES.values()},
}
_REMEDY = (
    "export with --requantize to round such layers again to integers, to another format, or quantize the original with "
    "a recipe that compressed-tensors can express (w4-gptq, w8-rtn, mxfp4, nvfp4)"
)


@dataclass(frozen=True)
class _Encoded:
    """One layer in the format: its scheme, and its tensors by the names behind the layer's."""

    format: str
    arguments: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def label(self) -> str:
        size = self.arguments.get("group_size")
        kind = f"{self.arguments['type']}{self.arguments['num_bits']}"
        return f"{self.format} {kind}, {f'group {size}' if size else self.arguments['strategy']}"

    @property
    def scheme(self) -> tuple[str, tuple[tuple[str, Any], ...]]:
        return self.format, tuple(sorted(self.arguments.items()))


def export(source: QuantizedFolder, out: Path, *, requantize: bool = False, fused: str = "server") -> Export:
    """Write a quantized model in the compressed-tensors format.

    Args:
        source: what quantlab wrote.
        out: the folder to write; it must not exist, or be empty.
        requantize: bring layers that the format cannot hold into it by rounding them again, or stored dense.
        fused: ``"server"`` refuses layers that a server fuses (q/k/v, gate/up) and that differ; ``"any"`` writes them:
            transformers loads them, vLLM does not.

    Raises:
        CheckpointError: names the first layer that cannot be held, the reason and the remedy; nothing is left there.
    """
    plain = source.skeleton(unfuse=False)
    modules = dict(plain.named_modules())
    usual = usual_group(source.layers.values())
    _check_headers(source, modules, requantize, usual)
    common = _common_scales(source) if requantize else {}
    done: list[ExportedLayer] = []
    schemes: dict[str, _Encoded] = {}
    with new_folder(out) as folder:
        writer = CheckpointWriter(folder)
        parts = list(source.parts())
        for index, (layers, kept) in enumerate(parts, 1):
            tensors = {name: source.files.read(name) for name in kept}
            for name in layers:
                if not isinstance(modules[name], nn.Linear):
                    tensors[f"{name}.weight"] = _dense(source.layer(name), modules[name], source.dtype)
                    done.append(ExportedLayer(name, "dense", False, "decoded: the format quantizes linear layers only"))
                    continue
                qtensor = source.layer(name)
                shared = common.get(name)
                moved = (
                    shared is not None and qtensor.outer is not None and not torch.equal(shared, qtensor.outer.scales)
                )
                if shared is not None and moved:
                    qtensor = under_common_scale(qtensor, shared)
                encoded, report = _encoded(name, qtensor, source.dtype, requantize, usual)
                if moved and report.exact:
                    report = replace(
                        report, exact=False, note="rounded again: under a global scale that its set shares"
                    )
                tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in encoded.tensors.items()}
                kept_of_it = {key: value for key, value in encoded.tensors.items() if value.numel() == 1}
                schemes[name] = replace(encoded, tensors=kept_of_it)
                done.append(report)
            writer.write(shard_name(index, len(parts)), tensors)
        if fused == "server":
            _check_fused(schemes)
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        config = {key: value for key, value in source.config.items() if key != "quantization_config"}
        writer.finish(config, _config(schemes, linear), source.folder)
        notes = _save_corrections(source, folder, out) if not requantize else ()
        copy_digest(source.folder, folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Export(out, "compressed-tensors", tuple(done), size, notes)


def _check_headers(
    source: QuantizedFolder, modules: Mapping[str, nn.Module], requantize: bool, usual: int | None
) -> None:
    refusals = Refusals("compressed-tensors", _REMEDY)
    for name, storage in source.layers.items():
        if name not in modules:
            raise CheckpointError(
                f"{name}: is one expert of a mixture, which transformers loads fused; compressed-tensors cannot hold "
                "it apart; use the folder itself with quantlab"
            )
        reason = _reason_against(storage, modules[name], usual)
        if reason and not requantize:
            refusals.add(name, reason)
    refusals.check()


def _reason_against(storage: Storage, module: nn.Module, usual: int | None = None) -> str | None:
    """Why the format cannot hold a layer that is stored like this; None if it can, by all that its header says."""
    size = granularity_of(storage, usual)
    if not isinstance(module, nn.Linear):
        return f"it is {type(module).__name__}, and only Linear is quantized"
    if storage.zero_dtype is not None:
        return (
            "its zero points would be packed, and transformers cannot load those (the library makes room for unpacked "
            "ones); quantize with symmetric: true, or export to gguf or gptq"
        )
    if storage.format.startswith("int"):
        if storage.scale_dtype in _DTYPES.values() and not storage.outer_scales:
            return None
        return f"scales stored as {storage.scale_dtype} have no place beside integers"
    if (storage.format, size, storage.scale_dtype) in _FLOATS:
        return None
    return f"no scheme has {storage.format} with scales in {storage.scale_dtype} for {_of(size)}"


def _of(size: int | str) -> str:
    return f"groups of {size}" if isinstance(size, int) else f"each {size}"


def _encoded(
    name: str, qtensor: QTensor, dtype: torch.dtype, requantize: bool, usual: int | None
) -> tuple[_Encoded, ExportedLayer]:
    note = ""
    if qtensor.low_rank is not None and not requantize:
        qtensor, note = replace(qtensor, low_rank=None), "without its low-rank correction, which is in adapter/"
    try:
        if qtensor.low_rank is not None:
            raise CannotHoldError("it has a low-rank correction")
        encoded = encode(qtensor, dtype, usual)
    except CannotHoldError as error:
        if not requantize:
            raise CheckpointError(f"{name}: compressed-tensors cannot hold it as it is: {error}; {_REMEDY}") from error
        size = granularity_of(Storage.of(qtensor), usual)
        bits = min(max(qtensor.grid.bits, 2), 8)
        encoded = encode(rounded_again(qtensor, bits, size, _DTYPES.get(dtype, "bfloat16")), dtype, usual)
        note = f"rounded again: {error}"
    return encoded, ExportedLayer(name, encoded.label, not note, note)


def encode(qtensor: QTensor, dtype: torch.dtype, usual: int | None = None) -> _Encoded:
    """A layer's scheme and tensors.

    Args:
        qtensor: without a low-rank correction.
        dtype: of the model, which scales are stored in.
        usual: the group size of the model's other layers.

    Raises:
        CannotHoldError: the format has no such scheme, or the scales are no numbers of ``dtype``.
    """
    storage = Storage.of(qtensor)
    reason = _reason_against(storage, nn.Linear(1, 1, device="meta"), usual)
    if reason is not None:
        raise CannotHoldError(reason)
    size = granularity_of(storage, usual)
    if storage.format.startswith("int"):
        return _integers(qtensor, storage, size, dtype)
    kind, bits = _FLOATS[(storage.format, size, storage.scale_dtype)]
    arguments = _arguments(bits, "float", size)
    if kind == "float-quantized":
        values = qtensor.grid.values[qtensor.codes.int()]
        tensors = {"weight": values.to(torch.float8_e4m3fn), "weight_scale": _scales(qtensor, dtype)}
        return _Encoded(kind, arguments, tensors)
    if kind == "nvfp4-pack-quantized":
        return _nvfp4(qtensor, arguments)
    arguments |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    scales = qtensor.scales.view(torch.uint8)
    if kind == "mxfp8-quantized":
        values = qtensor.grid.values[qtensor.codes.int()]
        return _Encoded(kind, arguments, {"weight": values.to(torch.float8_e4m3fn), "weight_scale": scales})
    packed = pack(_sign_and_magnitude(qtensor, bits), bits)
    return _Encoded(kind, arguments, {"weight_packed": packed, "weight_scale": scales})


def _integers(qtensor: QTensor, storage: Storage, size: int | str, dtype: torch.dtype) -> _Encoded:
    integers = integers_of(qtensor)
    assert integers is not None
    packed = pack(integers + 2 ** (storage.bits - 1), storage.bits)
    packed = as_words(nn.functional.pad(packed, (0, -packed.shape[1] % 4)))
    tensors = {
        "weight_packed": packed,
        "weight_scale": _scales(qtensor, dtype),
        "weight_shape": torch.tensor(qtensor.shape, dtype=torch.int64),
    }
    return _Encoded("pack-quantized", _arguments(storage.bits, "int", size), tensors)


def _nvfp4(qtensor: QTensor, arguments: dict[str, Any]) -> _Encoded:
    if qtensor.outer is None or qtensor.outer.scales.numel() != 1:
        raise CannotHoldError("its 8-bit scales have no single float32 above them")
    tensors = {
        "weight_packed": pack(_sign_and_magnitude(qtensor, 4), 4),
        "weight_scale": qtensor.scales,
        "weight_global_scale": 1 / qtensor.outer.scales.float(),
    }
    arguments |= {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
    arguments["strategy"] = "tensor_group"
    return _Encoded("nvfp4-pack-quantized", arguments, tensors)


def _arguments(bits: int, kind: str, size: int | str) -> dict[str, Any]:
    grouped = isinstance(size, int)
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": "group" if grouped else size,
        "group_size": size if grouped else None,
        "dynamic": False,
    }


def _scales(qtensor: QTensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales in the model's dtype: ``[out, groups]``, ``[out, 1]``, or ``[1]`` for a whole tensor."""
    scales = decode_scales(qtensor.scales, qtensor.outer)
    if not same_in(scales, dtype):
        raise CannotHoldError(
            f"its scales ({qtensor.scales.dtype}) are no numbers of the model's dtype, {dtype}, which the format keeps "
            "scales in"
        )
    whole = scales.numel() == 1 and qtensor.shape[0] > 1
    return scales.to(dtype).flatten() if whole else scales.to(dtype)


def _sign_and_magnitude(qtensor: QTensor, bits: int) -> torch.Tensor:
    """Codes as the bit patterns of a minifloat: a sign above the rank of the magnitude among all magnitudes."""
    values = qtensor.grid.values
    ranks = torch.searchsorted(values[values >= 0], values.abs())
    patterns = ranks + (values < 0) * 2 ** (bits - 1)
    return patterns.to(torch.uint8)[qtensor.codes.int()]


def _dense(qtensor: QTensor, module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    weight = qtensor.dequantize(dtype)
    return weight if isinstance(module, nn.Embedding) else weight.T  # GPT-2's Conv1D


def _common_scales(source: QuantizedFolder) -> dict[str, torch.Tensor]:
    """The float32 above the 8-bit scales that the layers of a fused set could share: the largest among them."""
    single = {name for name, storage in source.layers.items() if storage.outer_scales == 1}
    common = {}
    for members in fused_sets(single):
        largest = torch.stack([source.files.read(f"{name}.outer_scales") for name in members]).amax(0)
        common |= dict.fromkeys(members, largest)
    return common


def under_common_scale(qtensor: QTensor, shared: torch.Tensor) -> QTensor:
    """A weight under another second-level scale ``[1]``: its 8-bit scales and codes chosen again."""
    kind, outer = scale_type("e4m3"), OuterScales(shared)
    scales = Scales(kind.encode(decode_scales(qtensor.scales, qtensor.outer), outer), None, outer)
    return QTensor.of(apply_scales(qtensor.dequantize(), qtensor.grid, scales), scales, qtensor.grid)


def _check_fused(schemes: Mapping[str, _Encoded]) -> None:
    """Refuse layers that a server runs as one product and that do not agree."""
    for members in fused_sets(schemes):
        first, *others = members
        for other in others:
            what = None
            if schemes[first].scheme != schemes[other].scheme:
                what = f"is stored as {schemes[other].label}, {first} as {schemes[first].label}"
            elif "weight_global_scale" in schemes[first].tensors and not torch.equal(
                schemes[first].tensors["weight_global_scale"], schemes[other].tensors["weight_global_scale"]
            ):
                what = f"has another global scale than {first}"
            if what:
                raise CheckpointError(
                    f"{other}: {what}; servers run the two as one layer and would refuse the file, or answer garbage; "
                    "quantize them alike, for transformers alone export with --set fused=any, or, where only global scales "
                    "differ, with --requantize"
                )


def _config(schemes: Mapping[str, _Encoded], linear: list[str]) -> dict[str, Any]:
    """The ``quantization_config``: one group a scheme. Where there is one scheme its target is every linear layer."""
    groups: dict[Any, list[str]] = {}
    for name, encoded in schemes.items():
        groups.setdefault(encoded.scheme, []).append(name)
    formats = sorted({encoded.format for encoded in schemes.values()})
    described = {}
    for index, ((kind, arguments), names) in enumerate(groups.items()):
        described[f"group_{index}"] = {
            "targets": ["Linear"] if len(groups) == 1 else names,
            "weights": dict(arguments),
            "input_activations": None,
            "output_activations": None,
            "format": kind,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": described,
        "ignore": [name for name in linear if name not in schemes],
        "kv_cache_scheme": None,
    }


def _save_corrections(source: QuantizedFolder, folder: Path, out: Path) -> tuple[str, ...]:
    if not any(storage.low_rank for storage in source.layers.values()):
        return ()
    save_adapter(source.folder, folder / "adapter", str(out))
    return (f"the low-rank corrections are a PEFT adapter: PeftModel.from_pretrained(model, '{out / 'adapter'}')",)
