"""The modules that run a quantized model: linear layers and embeddings of packed codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from quantlab_kernels import decode, quantized_linear, unpack
from torch import nn

from quantlab.numerics import LowRank, OuterScales, QTensor, decode_scales
from quantlab.storage import Storage, packed_tensors, unpacked

_BUFFERS = (
    *("codes", "scales", "zeros", "table", "low_rank_left", "low_rank_right", "low_rank_scales"),
    *("outer_scales", "outer_offset"),
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
