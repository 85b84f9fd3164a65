"""One layer in a scheme of compressed-tensors: which schemes there are, and their tensors to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from quantlab_kernels import ACTIVATIONS, pack
from torch import nn

from quantlab.export.base import CannotHoldError, as_words, granularity_of, integers_of, same_in, sign_and_magnitude
from quantlab.numerics import OuterScales, QTensor, Scales, apply_scales, decode_scales, scale_type
from quantlab.storage import Storage

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


# Formats of floating-point codes, by table, group and stored scales: what compressed-tensors calls them, bits.
_FLOATS: dict[tuple[str, int | str, str], tuple[str, int]] = {
    ("e2m1", 16, "float8_e4m3fn"): ("nvfp4-pack-quantized", 4),
    ("e2m1", 32, "float8_e8m0fnu"): ("mxfp4-pack-quantized", 4),
    ("e2m3", 32, "float8_e8m0fnu"): ("mxfp6-pack-quantized", 6),
    ("e4m3", 32, "float8_e8m0fnu"): ("mxfp8-quantized", 8),
    **{("e4m3", size, dtype): ("float-quantized", 8) for size in ("channel", "tensor") for dtype in DTYPES.values()},
}


@dataclass(frozen=True)
class EncodedLayer:
    """One layer in the format: its scheme, and its tensors by the names behind the layer's.

    Attributes:
        format: as the library calls the layout.
        arguments: what it is told of the weight.
        tensors: by leaf name.
        inputs: what it is told of activations, or None: they stay as they are.
    """

    format: str
    arguments: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    inputs: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        """For a person: format, codes, and what shares a scale."""
        size = self.arguments.get("group_size")
        kind = f"{self.arguments['type']}{self.arguments['num_bits']}"
        inputs = "" if self.inputs is None else f", inputs {self.inputs['type']}{self.inputs['num_bits']} a token"
        return f"{self.format} {kind}, {f'group {size}' if size else self.arguments['strategy']}{inputs}"

    @property
    def scheme(self) -> tuple[str, tuple[tuple[str, Any], ...], tuple[tuple[str, Any], ...]]:
        """What layers that are stored alike have in common."""
        return self.format, tuple(sorted(self.arguments.items())), tuple(sorted((self.inputs or {}).items()))


def reason_against(storage: Storage, module: nn.Module, usual: int | None = None) -> str | None:
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
        if storage.scale_dtype in DTYPES.values() and not storage.outer_scales:
            return None
        return f"scales stored as {storage.scale_dtype} have no place beside integers"
    if (storage.format, size, storage.scale_dtype) in _FLOATS:
        return None
    return f"no scheme has {storage.format} with scales in {storage.scale_dtype} for {_of(size)}"


def _of(size: int | str) -> str:
    return f"groups of {size}" if isinstance(size, int) else f"each {size}"


def encode(qtensor: QTensor, dtype: torch.dtype, usual: int | None = None, activations: str = "none") -> EncodedLayer:
    """A layer's scheme and tensors.

    Args:
        qtensor: without a low-rank correction.
        dtype: of the model, which scales are stored in.
        usual: the group size of the model's other layers.
        activations: what the layer's inputs are rounded to.

    Raises:
        CannotHoldError: the format has no such scheme, or the scales are no numbers of ``dtype``.
    """
    storage = Storage.of(qtensor)
    reason = reason_against(storage, nn.Linear(1, 1, device="meta"), usual)
    if reason is not None:
        raise CannotHoldError(reason)
    size = granularity_of(storage, usual)
    if activations != "none":
        return _by_eight(qtensor, storage, size, dtype, activations)
    if storage.format.startswith("int"):
        return _integers(qtensor, storage, size, dtype)
    kind, bits = _FLOATS[(storage.format, size, storage.scale_dtype)]
    arguments = _arguments(bits, "float", size)
    if kind == "float-quantized":
        values = qtensor.grid.values[qtensor.codes.int()]
        tensors = {"weight": values.to(torch.float8_e4m3fn), "weight_scale": _scales(qtensor, dtype)}
        return EncodedLayer(kind, arguments, tensors)
    if kind == "nvfp4-pack-quantized":
        return _nvfp4(qtensor, arguments)
    arguments |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    scales = qtensor.scales.view(torch.uint8)
    if kind == "mxfp8-quantized":
        values = qtensor.grid.values[qtensor.codes.int()]
        return EncodedLayer(kind, arguments, {"weight": values.to(torch.float8_e4m3fn), "weight_scale": scales})
    packed = pack(sign_and_magnitude(qtensor.grid)[qtensor.codes.int()], bits)
    return EncodedLayer(kind, arguments, {"weight_packed": packed, "weight_scale": scales})


def _integers(qtensor: QTensor, storage: Storage, size: int | str, dtype: torch.dtype) -> EncodedLayer:
    integers = integers_of(qtensor)
    assert integers is not None
    packed = pack(integers + 2 ** (storage.bits - 1), storage.bits)
    packed = as_words(nn.functional.pad(packed, (0, -packed.shape[1] % 4)))
    tensors = {
        "weight_packed": packed,
        "weight_scale": _scales(qtensor, dtype),
        "weight_shape": torch.tensor(qtensor.shape, dtype=torch.int64),
    }
    return EncodedLayer("pack-quantized", _arguments(storage.bits, "int", size), tensors)


def _by_eight(
    qtensor: QTensor, storage: Storage, size: int | str, dtype: torch.dtype, activations: str
) -> EncodedLayer:
    """A weight that meets activations of 8 bits: a byte a weight, whatever its bits, as servers multiply it."""
    kind, name = ("int", "int-quantized") if activations == "int8" else ("float", "float-quantized")
    if isinstance(size, int):  # one group a row, and neighbours with several
        size = "channel"
    values = qtensor.grid.values[qtensor.codes.int()]
    tensors = {"weight": values.to(ACTIVATIONS[activations]), "weight_scale": _scales(qtensor, dtype)}
    inputs = {**_arguments(8, kind, "token"), "dynamic": True}
    return EncodedLayer(name, _arguments(storage.bits, kind, size), tensors, inputs)


def _nvfp4(qtensor: QTensor, arguments: dict[str, Any]) -> EncodedLayer:
    if qtensor.outer is None or qtensor.outer.scales.numel() != 1:
        raise CannotHoldError("its 8-bit scales have no single float32 above them")
    tensors = {
        "weight_packed": pack(sign_and_magnitude(qtensor.grid)[qtensor.codes.int()], 4),
        "weight_scale": qtensor.scales,
        "weight_global_scale": 1 / qtensor.outer.scales.float(),
    }
    arguments |= {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
    arguments["strategy"] = "tensor_group"
    return EncodedLayer("nvfp4-pack-quantized", arguments, tensors)


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


def under_common_scale(qtensor: QTensor, shared: torch.Tensor) -> QTensor:
    """A weight under another second-level scale ``[1]``: its 8-bit scales and codes chosen again."""
    kind, outer = scale_type("e4m3"), OuterScales(shared)
    scales = Scales(kind.encode(decode_scales(qtensor.scales, qtensor.outer), outer), None, outer)
    return QTensor.of(apply_scales(qtensor.dequantize(), qtensor.grid, scales), scales, qtensor.grid)
