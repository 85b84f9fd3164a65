"""compressed-tensors: what vLLM and plain ``AutoModelForCausalLM.from_pretrained`` load.

A layer ``M`` becomes ``M.weight_packed`` (or ``M.weight``), ``M.weight_scale`` and what its scheme has besides; the
schemes, with the layers that they are for, stand in config.json. Layouts: those of the library's version 0.20 (dense
bit streams for widths that do not divide 32).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantlab.checkpoint.adapter import save_adapter
from quantlab.checkpoint.quantized import QuantizedFolder
from quantlab.checkpoint.writer import CheckpointWriter, weight_bytes
from quantlab.errors import CheckpointError
from quantlab.export.base import (
    Export,
    ExportedLayer,
    Refusals,
    check_biases,
    copy_digest,
    encoded_or_rounded,
    fused_sets,
    granularity_of,
    new_folder,
    plain_config,
    rounded_again,
    usual_group,
    write_parts,
)
from quantlab.export.compressed_layers import DTYPES, EncodedLayer, encode, reason_against, under_common_scale
from quantlab.numerics import QTensor
from quantlab.storage import Storage

_REMEDY = (
    "export with --requantize to round such layers again to integers, to another format, or quantize the original with "
    "a recipe that compressed-tensors can express (w4-gptq, w8-rtn, w8a8, fp8, mxfp4, nvfp4)"
)


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
    schemes: dict[str, EncodedLayer] = {}
    with new_folder(out) as folder:
        writer = CheckpointWriter(folder)

        def tensors_of(name: str) -> Mapping[str, torch.Tensor]:
            if not isinstance(modules[name], nn.Linear):
                done.append(ExportedLayer(name, "dense", False, "decoded: the format quantizes linear layers only"))
                return {"weight": _dense(source.layer(name), modules[name], source.dtype)}
            qtensor, moved = _under_common(source.layer(name), common.get(name))
            activations = source.layers[name].activations
            encoded, report = _encoded(name, qtensor, source.dtype, requantize, usual, activations)
            if moved and report.exact:
                report = replace(report, exact=False, note="rounded again: under a global scale of its fused set")
            kept_of_it = {key: value for key, value in encoded.tensors.items() if value.numel() == 1}
            schemes[name] = replace(encoded, tensors=kept_of_it)
            done.append(report)
            return encoded.tensors

        write_parts(writer, source, tensors_of)
        if fused == "server":
            _check_fused(schemes)
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        writer.finish(plain_config(source), _config(schemes, linear), source.folder)
        notes = _save_corrections(source, folder, out) if not requantize else ()
        copy_digest(source.folder, writer, done)
        size = weight_bytes(folder)
    return Export(out, "compressed-tensors", tuple(done), size, notes)


def _check_headers(
    source: QuantizedFolder, modules: Mapping[str, nn.Module], requantize: bool, usual: int | None
) -> None:
    check_biases(source, modules, "compressed-tensors")
    refusals = Refusals("compressed-tensors", _REMEDY)
    for name, storage in source.layers.items():
        if name not in modules:
            raise CheckpointError(
                f"{name}: is one expert of a mixture, which transformers loads fused; compressed-tensors cannot hold "
                "it apart; use the folder itself with quantlab"
            )
        reason = reason_against(storage, modules[name], usual)
        if reason and not requantize:
            refusals.add(name, reason)
    refusals.check()


def _encoded(
    name: str, qtensor: QTensor, dtype: torch.dtype, requantize: bool, usual: int | None, activations: str
) -> tuple[EncodedLayer, ExportedLayer]:
    def again(qtensor: QTensor) -> EncodedLayer:
        size = granularity_of(Storage.of(qtensor), usual)
        bits = min(max(qtensor.grid.bits, 2), 8)
        integers = rounded_again(qtensor, bits, size, DTYPES.get(dtype, "bfloat16"))
        return encode(integers, dtype, usual, "none" if activations == "none" else "int8")

    encoded, note = encoded_or_rounded(
        name,
        qtensor,
        lambda qtensor: encode(qtensor, dtype, usual, activations),
        again if requantize else None,
        "compressed-tensors",
        _REMEDY,
    )
    return encoded, ExportedLayer(name, encoded.label, not note, note)


def _dense(qtensor: QTensor, module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    weight = qtensor.dequantize(dtype)
    return weight if isinstance(module, nn.Embedding) else weight.T  # GPT-2's Conv1D


def _under_common(qtensor: QTensor, shared: torch.Tensor | None) -> tuple[QTensor, bool]:
    """The weight under its set's second-level scale, and whether that is another than its own."""
    if shared is None or qtensor.outer is None or torch.equal(shared, qtensor.outer.scales):
        return qtensor, False
    return under_common_scale(qtensor, shared), True


def _common_scales(source: QuantizedFolder) -> dict[str, torch.Tensor]:
    """The float32 above the 8-bit scales that the layers of a fused set could share: the largest among them."""
    single = {name for name, storage in source.layers.items() if storage.outer_scales == 1}
    common: dict[str, torch.Tensor] = {}
    for members in fused_sets(single):
        largest = torch.stack([source.files.read(f"{name}.outer_scales") for name in members]).amax(0)
        common |= dict.fromkeys(members, largest)
    return common


def _check_fused(schemes: Mapping[str, EncodedLayer]) -> None:
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
                    "quantize them alike, for transformers alone export with --set fused=any, or, where only global "
                    "scales differ, with --requantize"
                )


def _config(schemes: Mapping[str, EncodedLayer], linear: list[str]) -> dict[str, Any]:
    """The ``quantization_config``: one group a scheme. Where there is one scheme its target is every linear layer."""
    groups: dict[Any, list[str]] = {}
    for name, encoded in schemes.items():
        groups.setdefault(encoded.scheme, []).append(name)
    formats = sorted({encoded.format for encoded in schemes.values()})
    described = {}
    for index, ((kind, arguments, inputs), names) in enumerate(groups.items()):
        described[f"group_{index}"] = {
            "targets": ["Linear"] if len(groups) == 1 else names,
            "weights": dict(arguments),
            "input_activations": dict(inputs) or None,
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


def rounds_inputs(config: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` says of any layer that its inputs are rounded as they come.

    Only this format can say so: of another's the answer is no.
    """
    return any(group.get("input_activations") is not None for group in config.get("config_groups", {}).values())


def _save_corrections(source: QuantizedFolder, folder: Path, out: Path) -> tuple[str, ...]:
    if not any(storage.low_rank for storage in source.layers.values()):
        return ()
    save_adapter(source.folder, folder / "adapter", str(out))
    return (f"the low-rank corrections are a PEFT adapter: PeftModel.from_pretrained(model, '{out / 'adapter'}')",)
