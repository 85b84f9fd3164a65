"""How a quantized layer lies in memory and on disk: its description, its tensors, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from quantlab_kernels import pack, packed_width, unpack

from quantlab.errors import QuantlabError
from quantlab.numerics import ACTIVATIONS, Grid, LowRank, OuterScales, QTensor


@dataclass(frozen=True)
class Storage:
    """How a quantized linear layer lies in memory and on disk: everything but the numbers.

    Attributes:
        format: the grid's name.
        bits: width of a code.
        table_size: how many values the grid has.
        in_features: columns of the weight.
        out_features: rows of the weight.
        scale_shape: ``(rows, groups)`` of the scales, and of the zeros where there are any.
        scale_dtype: of the stored scales, as torch calls it: ``bfloat16``.
        zero_dtype: of the zeros, or None (symmetric).
        low_rank: the rank of the correction, 0 if there is none.
        low_rank_dtype: of the correction's factors, or None; int8 factors have scales.
        outer_scales: how many second-level scales the scales have, 0 if none.
        outer_offset: whether an offset is added to the scales.
        bias: whether the layer has a bias.
        activations: what its inputs are rounded to as they come, see :class:`quantlab.recipe.Scheme`.
    """

    format: str
    bits: int
    table_size: int
    in_features: int
    out_features: int
    scale_shape: tuple[int, int]
    scale_dtype: str
    zero_dtype: str | None = None
    low_rank: int = 0
    low_rank_dtype: str | None = None
    outer_scales: int = 0
    outer_offset: bool = False
    bias: bool = False
    activations: str = "none"

    def __post_init__(self) -> None:
        rows, groups = self.scale_shape
        sound = (
            1 <= self.bits <= 8
            and 2 <= self.table_size <= 2**self.bits
            and rows in (1, self.out_features)
            and groups >= 1
            and self.in_features % groups == 0
            and self.activations in ACTIVATIONS
        )
        if not sound:
            raise QuantlabError(f"not a layer that can be stored: {self}")

    @classmethod
    def of(cls, qtensor: QTensor, bias: bool = False, activations: str = "none") -> Storage:
        """How ``qtensor`` is stored."""
        low_rank, outer = qtensor.low_rank, qtensor.outer
        return cls(
            format=qtensor.grid.name,
            bits=qtensor.grid.bits,
            table_size=len(qtensor.grid),
            in_features=qtensor.shape[1],
            out_features=qtensor.shape[0],
            scale_shape=(qtensor.scales.shape[0], qtensor.scales.shape[1]),
            scale_dtype=dtype_name(qtensor.scales.dtype),
            zero_dtype=None if qtensor.zeros is None else dtype_name(qtensor.zeros.dtype),
            low_rank=0 if low_rank is None else low_rank.rank,
            low_rank_dtype=None if low_rank is None else dtype_name(low_rank.left.dtype),
            outer_scales=0 if outer is None else outer.scales.numel(),
            outer_offset=outer is not None and outer.offset is not None,
            bias=bias,
            activations=activations,
        )

    @property
    def offset(self) -> int:
        """What is added to a code of an integer format; 0 for formats whose table is looked up."""
        return -(self.table_size // 2) if self.format.startswith("int") else 0

    def to_dict(self) -> dict[str, Any]:
        """A JSON mapping that :meth:`from_dict` reads back; what is at its default is left out."""
        fields = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, (value, default) in fields.items()
            if value != default
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Storage:
        """Undo :meth:`to_dict`.

        Raises:
            QuantlabError: a key is unknown or missing.
        """
        try:
            return cls(**{**data, "scale_shape": tuple(data["scale_shape"])})
        except (KeyError, TypeError, ValueError) as error:
            raise QuantlabError(f"not the description of a quantized layer: {dict(data)} ({error})") from error

    def specs(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor that the layer stores, but its bias."""
        packed = (self.out_features, packed_width(self.in_features, self.bits))
        specs = {
            "codes": (packed, torch.uint8),
            "scales": (self.scale_shape, _dtype(self.scale_dtype)),
            "table": ((self.table_size,), torch.float32),
        }
        if self.zero_dtype is not None:
            specs["zeros"] = (self.scale_shape, _dtype(self.zero_dtype))
        if self.low_rank:
            dtype = _dtype(self.low_rank_dtype or self.scale_dtype)
            specs["low_rank_left"] = ((self.out_features, self.low_rank), dtype)
            specs["low_rank_right"] = ((self.low_rank, self.in_features), dtype)
            if dtype == torch.int8:
                specs["low_rank_scales"] = ((self.low_rank,), torch.float32)
        if self.outer_scales:
            specs["outer_scales"] = ((self.outer_scales,), torch.float32)
        if self.outer_offset:
            specs["outer_offset"] = ((1,), torch.float32)
        return specs


def packed_tensors(qtensor: QTensor) -> dict[str, torch.Tensor]:
    """The tensors that store ``qtensor``, by the names that :meth:`Storage.specs` gives them."""
    low_rank, outer = qtensor.low_rank, qtensor.outer
    tensors = {
        "codes": pack(qtensor.codes, qtensor.grid.bits),
        "scales": qtensor.scales,
        "table": qtensor.grid.values.to(qtensor.codes.device),
    }
    optional = {"zeros": qtensor.zeros}
    if low_rank is not None:
        optional |= {
            "low_rank_left": low_rank.left,
            "low_rank_right": low_rank.right,
            "low_rank_scales": low_rank.scales,
        }
    if outer is not None:
        optional |= {"outer_scales": outer.scales, "outer_offset": outer.offset}
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def unpacked(tensors: Mapping[str, torch.Tensor], storage: Storage) -> QTensor:
    """Undo :func:`packed_tensors`."""
    low_rank = outer = None
    if storage.low_rank:
        low_rank = LowRank(tensors["low_rank_left"], tensors["low_rank_right"], tensors.get("low_rank_scales"))
    if storage.outer_scales:
        outer = OuterScales(tensors["outer_scales"], tensors.get("outer_offset"))
    return QTensor(
        codes=unpack(tensors["codes"], storage.bits, storage.in_features),
        scales=tensors["scales"],
        zeros=tensors.get("zeros"),
        grid=Grid(storage.format, storage.bits, tensors["table"].cpu()),
        low_rank=low_rank,
        outer=outer,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """As torch calls it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise QuantlabError(f"{name!r} is not a dtype of torch")
    return dtype
