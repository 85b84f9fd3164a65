"""The modules that run a quantized model: layers and embeddings of packed codes, and experts as linear layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from quantlab_kernels import decode, pack, packed_width, quantized_linear, unpack
from torch import nn

from quantlab.errors import QuantlabError
from quantlab.experts import UnfusedExperts, unfuse_experts
from quantlab.numerics import ACTIVATIONS, Grid, LowRank, OuterScales, QTensor, decode_scales

__all__ = ["QuantEmbedding", "QuantLinear", "Storage", "UnfusedExperts", "packed_tensors", "unfuse_experts", "unpacked"]


_BUFFERS = (
    *("codes", "scales", "zeros", "table", "low_rank_left", "low_rank_right", "low_rank_scales"),
    *("outer_scales", "outer_offset"),
)


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
            scale_dtype=_dtype_name(qtensor.scales),
            zero_dtype=None if qtensor.zeros is None else _dtype_name(qtensor.zeros),
            low_rank=0 if low_rank is None else low_rank.rank,
            low_rank_dtype=None if low_rank is None else _dtype_name(low_rank.left),
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


class _Quantized(nn.Module):
    """A module whose weight is a :class:`QTensor`, stored as packed codes.

    The buffers keep their dtypes: ``.to(dtype)``, ``.half()`` and their like change where the module lives and the
    dtype of its bias, never the numbers that the weight is made of.

    Made from a :class:`Storage` alone its buffers are empty, on the default device (which may be meta).

    Attributes:
        storage: how the weight is stored.
        dtype: of the model around it; what :attr:`weight` is decoded to.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor
    bias: nn.Parameter | None
    zeros: torch.Tensor | None
    low_rank_left: torch.Tensor | None
    low_rank_right: torch.Tensor | None
    low_rank_scales: torch.Tensor | None
    outer_scales: torch.Tensor | None
    outer_offset: torch.Tensor | None

    def __init__(self, storage: Storage) -> None:
        super().__init__()
        self.storage = storage
        self.dtype = torch.get_default_dtype()
        specs = storage.specs()
        for name in _BUFFERS:
            shape, dtype = specs.get(name, (None, None))
            self.register_buffer(name, None if shape is None else torch.empty(shape, dtype=dtype))
        bias = nn.Parameter(torch.empty(storage.out_features), requires_grad=False) if storage.bias else None
        self.register_parameter("bias", bias)
        self._decoded: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None] | None = None

    @classmethod
    def from_qtensor(
        cls,
        qtensor: QTensor,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        activations: str = "none",
    ) -> Self:
        """The module with the weight ``qtensor``, sharing the tensors' memory where it can."""
        with torch.device("meta"):
            layer = cls(Storage.of(qtensor, bias is not None, activations))
        layer.dtype = dtype or layer.dtype
        for name, tensor in packed_tensors(qtensor).items():
            setattr(layer, name, tensor)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        return layer

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.storage.in_features

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.storage.out_features

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.storage.bits

    @property
    def weight(self) -> torch.Tensor:
        """The weight ``[out, in]``, decoded anew at every access, for model code that looks at weights."""
        return self.to_qtensor().dequantize(self.dtype)

    def to_qtensor(self) -> QTensor:
        """The weight, with its codes unpacked."""
        return unpacked({name: tensor for name, tensor in self.named_buffers() if tensor is not None}, self.storage)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        scales = "x".join(map(str, self.storage.scale_shape))
        features = f"in_features={self.in_features}, out_features={self.out_features}"
        activations = "" if self.storage.activations == "none" else f", activations={self.storage.activations}"
        return f"{features}, format={self.storage.format}, scales={scales}, bias={self.storage.bias}{activations}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        self._decoded = None
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self


class QuantLinear(_Quantized):
    """A linear layer of packed codes. It computes in the dtype of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in the dtype of ``x``."""
        scales, low_rank = self._operands()
        storage = self.storage
        weight = (self.codes, scales, self.zeros, self.table, storage.bits, self.bias, low_rank, storage.offset)
        return quantized_linear(x, *weight, self.activations)

    @property
    def activations(self) -> str | None:
        """What inputs are rounded to before they are multiplied, or None."""
        return None if self.storage.activations == "none" else self.storage.activations

    @staticmethod
    def compile_options(cpp_wrapper: bool) -> dict[str, Any]:
        """What torch's compiler is told of such layers; :mod:`quantlab_kernels.compiled` says why."""
        from quantlab_kernels.compiled import compile_options  # which takes the compiler with it

        return compile_options(cpp_wrapper)

    def _operands(self) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Scales and low-rank factors as kernels take them: scales of two levels and int8 factors are decoded, once."""
        left, right = self.low_rank_left, self.low_rank_right
        low_rank = None if left is None or right is None else (left, right)
        if self.outer_scales is None and self.low_rank_scales is None:
            return self.scales, low_rank
        if self._decoded is None:
            scales = self.scales
            if self.outer_scales is not None:
                scales = decode_scales(scales, OuterScales(self.outer_scales, self.outer_offset))
            if low_rank is not None:
                low_rank = (LowRank(*low_rank, self.low_rank_scales).scaled_left(), low_rank[1])
            self._decoded = (scales, low_rank)
        return self._decoded


class QuantEmbedding(_Quantized):
    """An embedding of packed codes: only the rows that are looked up are decoded. Its output is in :attr:`dtype`."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids ``[...]`` to rows ``[..., in_features]``."""
        rows = ids.flatten()
        outer = None if self.outer_scales is None else OuterScales(self.outer_scales, self.outer_offset)
        scales = decode_scales(self.scales, outer)
        per_row = scales.shape[0] > 1
        zeros = self.zeros[rows] if self.zeros is not None and per_row else self.zeros
        codes = unpack(self.codes[rows], self.storage.bits, self.storage.in_features)
        weight = decode(codes, scales[rows] if per_row else scales, zeros, self.table)
        if self.low_rank_left is not None and self.low_rank_right is not None:
            left = LowRank(self.low_rank_left[rows], self.low_rank_right, self.low_rank_scales).scaled_left()
            weight = weight + left @ self.low_rank_right.float()
        return weight.to(self.dtype).view(*ids.shape, self.storage.in_features)


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise QuantlabError(f"{name!r} is not a dtype of torch")
    return dtype
