"""The modules that run a quantized model: a linear layer of packed codes, and experts as ordinary linear layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantlab.errors import QuantlabError
from quantlab.numerics import Grid, LowRank, QTensor
from quantlab_kernels import pack, packed_width, quantized_linear, unpack


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
        scale_dtype: of the scales, as torch calls it: ``bfloat16``.
        zero_dtype: of the zeros, or None (symmetric).
        low_rank: the rank of the correction, 0 if there is none.
        low_rank_dtype: of the correction's factors, or None.
        bias: whether the layer has a bias.
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
    bias: bool = False

    def __post_init__(self) -> None:
        rows, groups = self.scale_shape
        sound = (
            1 <= self.bits <= 8
            and 2 <= self.table_size <= 2**self.bits
            and rows in (1, self.out_features)
            and groups >= 1
            and self.in_features % groups == 0
        )
        if not sound:
            raise QuantlabError(f"not a layer that can be stored: {self}")

    @classmethod
    def of(cls, qtensor: QTensor, bias: bool = False) -> Storage:
        """How ``qtensor`` is stored."""
        low_rank = qtensor.low_rank
        return cls(
            format=qtensor.grid.name,
            bits=qtensor.grid.bits,
            table_size=len(qtensor.grid),
            in_features=qtensor.shape[1],
            out_features=qtensor.shape[0],
            scale_shape=(qtensor.scales.shape[0], qtensor.scales.shape[1]),
            scale_dtype=_dtype_name(qtensor.scales),
            zero_dtype=None if qtensor.zeros is None else _dtype_name(qtensor.zeros),
            low_rank=0 if low_rank is None else low_rank.left.shape[1],
            low_rank_dtype=None if low_rank is None else _dtype_name(low_rank.left),
            bias=bias,
        )

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
            raise QuantlabError(
                f"not the description of a quantized layer: {dict(data)} ({error})"
            ) from error

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
        return specs


def packed_tensors(qtensor: QTensor) -> dict[str, torch.Tensor]:
    """The tensors that store ``qtensor``: ``codes`` (packed), ``scales``, ``table``, and those that it has of
    ``zeros``, ``low_rank_left``, ``low_rank_right``.
    """
    tensors = {
        "codes": pack(qtensor.codes, qtensor.grid.bits),
        "scales": qtensor.scales,
        "table": qtensor.grid.values.to(qtensor.codes.device),
    }
    if qtensor.zeros is not None:
        tensors["zeros"] = qtensor.zeros
    if qtensor.low_rank is not None:
        tensors["low_rank_left"] = qtensor.low_rank.left
        tensors["low_rank_right"] = qtensor.low_rank.right
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def unpacked(tensors: Mapping[str, torch.Tensor], storage: Storage) -> QTensor:
    """Undo :func:`packed_tensors`."""
    low_rank = None
    if storage.low_rank:
        low_rank = LowRank(tensors["low_rank_left"], tensors["low_rank_right"])
    return QTensor(
        codes=unpack(tensors["codes"], storage.bits, storage.in_features),
        scales=tensors["scales"],
        zeros=tensors.get("zeros"),
        grid=Grid(storage.format, storage.bits, tensors["table"].cpu()),
        low_rank=low_rank,
    )


class QuantLinear(nn.Module):
    """A linear layer whose weight is a :class:`QTensor`, stored as packed codes.

    The buffers keep their dtypes: ``.to(dtype)``, ``.half()`` and their like change where the layer lives and the
    dtype of its bias, never the numbers that the weight is made of. The layer computes in the dtype of its input.

    Made from a :class:`Storage` alone the buffers are empty, on the current default device (which may be meta).

    Attributes:
        storage: how the weight is stored.
        dtype: of the model around it; what :attr:`weight` is decoded to.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor
    zeros: torch.Tensor | None
    low_rank_left: torch.Tensor | None
    low_rank_right: torch.Tensor | None

    def __init__(self, storage: Storage) -> None:
        super().__init__()
        self.storage = storage
        self.dtype = torch.get_default_dtype()
        specs = storage.specs()
        for name in ("codes", "scales", "zeros", "table", "low_rank_left", "low_rank_right"):
            shape, dtype = specs.get(name, (None, None))
            self.register_buffer(name, None if shape is None else torch.empty(shape, dtype=dtype))
        bias = nn.Parameter(torch.empty(storage.out_features), requires_grad=False) if storage.bias else None
        self.register_parameter("bias", bias)

    @classmethod
    def from_qtensor(
        cls, qtensor: QTensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> QuantLinear:
        """The layer ``x @ qtensor.dequantize().T + bias``, sharing the tensors' memory where it can."""
        with torch.device("meta"):
            layer = cls(Storage.of(qtensor, bias is not None))
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
        """The weight ``[out, in]``, decoded anew at every access: for model code that looks at its layers' weights."""
        return self.to_qtensor().dequantize(self.dtype)

    def to_qtensor(self) -> QTensor:
        """The weight, with its codes unpacked."""
        return unpacked(
            {name: tensor for name, tensor in self.named_buffers() if tensor is not None}, self.storage
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in the dtype of ``x``."""
        low_rank = None
        if self.low_rank_left is not None and self.low_rank_right is not None:
            low_rank = (self.low_rank_left, self.low_rank_right)
        return quantized_linear(
            x, self.codes, self.scales, self.zeros, self.table, self.storage.bits, self.bias, low_rank
        )

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        storage = self.storage
        groups = "x".join(map(str, storage.scale_shape))
        return f"in_features={storage.in_features}, out_features={storage.out_features}, {storage.format}, scales={groups}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        before = dict(self._buffers)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self


class UnfusedExperts(nn.Module):
    """The experts of a mixture as linear layers of their own, for hooks, statistics and quantization.

    transformers keeps all experts of a layer in two 3-D parameters. Here expert ``e`` is the child ``"e"`` with the
    children ``gate_up_proj`` (``up_proj`` where there is no gate) and ``down_proj``. The forward pass is the eager
    loop of transformers' experts classes; an expert that no token is routed to is not called.
    """

    num_experts: int

    @staticmethod
    def is_fused(module: nn.Module) -> bool:
        """Whether ``module`` keeps several experts' matrices in 3-D parameters."""
        parameters = module._parameters
        up = parameters.get("gate_up_proj", parameters.get("up_proj"))
        down = parameters.get("down_proj")
        return up is not None and down is not None and up.ndim == 3 and down.ndim == 3

    @classmethod
    def from_fused(cls, fused: nn.Module) -> UnfusedExperts:
        """The same experts, their weights views of the fused parameters (or on the meta device).

        Raises:
            QuantlabError: the module is not one of those that share transformers' experts interface, or it has
                parameters that the interface does not know.
        """
        up_name = _checked_up_name(fused)
        experts = cls()
        for name, value in vars(fused).items():  # the numbers and functions that its gate reads
            if not name.startswith("_") and name not in vars(experts):
                setattr(experts, name, value)
        experts.up_name = up_name
        experts.apply_gate = type(fused)._apply_gate if up_name == "gate_up_proj" else _activate  # type: ignore[attr-defined]
        for name, child in fused.named_children():
            experts.add_module(name, child)
        experts.num_experts = len(fused._parameters["down_proj"])  # type: ignore[arg-type]
        for e in range(experts.num_experts):
            expert = nn.Module()
            for name in (up_name, "down_proj"):
                expert.add_module(name, _expert_linear(fused, name, e))
            experts.add_module(str(e), expert)
        return experts.train(fused.training)

    @staticmethod
    def origin(name: str) -> tuple[str, int] | None:
        """Where the parameter ``name`` (relative to the experts) lies in the fused module: its name and index."""
        expert, _, rest = name.partition(".")
        if not expert.isdigit():
            return None
        proj, _, leaf = rest.rpartition(".")
        return (f"{proj}_bias" if leaf == "bias" else proj), int(expert)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """``[tokens, hidden]`` with the experts ``[tokens, k]`` of each token and their weights, to ``[tokens, hidden]``."""
        result = torch.zeros_like(hidden_states)
        with torch.no_grad():
            chosen = nn.functional.one_hot(top_k_index, num_classes=self.num_experts + 1).permute(2, 1, 0)
            hit = chosen.sum(dim=(-1, -2)).nonzero().flatten().tolist()
        for e in hit:
            if e == self.num_experts:  # transformers' mark for a slot that is not used
                continue
            position, token = torch.where(chosen[e])
            expert = self.get_submodule(str(e))
            up = getattr(expert, self.up_name)(hidden_states[token])
            out = expert.down_proj(self.apply_gate(self, up))
            if self.has_post_expert_norm:
                out = self.post_expert_norm(out)
            out = out * top_k_weights[token, position, None]
            result.index_add_(0, token, out.to(result.dtype))
        return result


def _activate(experts: UnfusedExperts, up: torch.Tensor) -> torch.Tensor:
    return experts.act_fn(up)


def _checked_up_name(fused: nn.Module) -> str:
    kind = type(fused).__name__
    if not hasattr(fused, "has_gate") or not hasattr(type(fused), "_apply_gate"):
        raise QuantlabError(
            f"{kind}: its fused experts do not follow transformers' experts interface; quantlab cannot take them apart"
        )
    up_name = "gate_up_proj" if fused.has_gate else "up_proj"
    known = {up_name, "down_proj"} | ({f"{up_name}_bias", "down_proj_bias"} if fused.has_bias else set())
    if unknown := set(fused._parameters) ^ known:
        raise QuantlabError(
            f"{kind}: quantlab does not know the parameters {sorted(unknown)} of these fused experts"
        )
    return up_name


def _expert_linear(fused: nn.Module, name: str, e: int) -> nn.Linear:
    weight = fused._parameters[name][e]  # type: ignore[index]
    if fused.is_transposed:
        weight = weight.T
    bias = fused._parameters[f"{name}_bias"][e] if fused.has_bias else None  # type: ignore[index]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def unfuse_experts(model: nn.Module) -> list[str]:
    """Replace every module of fused experts in ``model`` by :class:`UnfusedExperts`; return their names."""
    names = [name for name, module in model.named_modules() if UnfusedExperts.is_fused(module)]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, UnfusedExperts.from_fused(model.get_submodule(name)))
    return names


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise QuantlabError(f"{name!r} is not a dtype of torch")
    return dtype
