"""A stand-in for a model that is too large to try things out on: the same modules, few random weights, a few tokens.

Blocks and experts of one class share their weights, and vocabularies have a few rows, so that a probe takes the memory
of one block; random weights, because what holds for them holds for all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantlab.checkpoint.placement import all_tensors, assign
from quantlab.checkpoint.source import ModelSource
from quantlab.engine.architecture import Architecture
from quantlab.engine.forward import model_inputs
from quantlab.engine.hooks import hooked
from quantlab.errors import PreflightError

_TOKENS = 16
_ROWS = 64


@dataclass(frozen=True, eq=False)
class Call:
    """What a module was handed and what it returned, as rows of float32; of a large module only the first token's.

    Attributes:
        name: the module's.
        rows: a hash of each row of its input.
        returned: a hash of each row of its output.
        input: its first row; of a block, and of a module without matrices, all rows.
        output: the same of its output.
    """

    name: str
    rows: tuple[int, ...]
    returned: tuple[int, ...]
    input: torch.Tensor
    output: torch.Tensor


@dataclass(eq=False)
class Trace:
    """All calls in the order in which they were made; those of blocks, which end later, by the time they began.

    Attributes:
        calls: of modules with a weight of their own, or without children.
        entries: what each block was handed, as rows, in the order of calls.
        output: what the model returned, as rows.
    """

    calls: list[Call] = field(default_factory=list)
    entries: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    output: torch.Tensor | None = None


def probe(source: ModelSource, architecture: Architecture) -> PreTrainedModel:
    """A model of the source's modules in float32, with random weights; nothing is tied but what stands in for others.

    Persistent buffers are the source's own. Every gain and bias is random too, so that what depends on one shows.
    """
    model = source.skeleton()
    model.float()  # and the dtypes that some modules keep for themselves
    generator = torch.Generator().manual_seed(0)
    vocabulary = _vocabulary(model)
    shared: dict[tuple[Any, ...], torch.Tensor] = {}
    for module, leaf, name, tensor in list(all_tensors(model)):
        block, shape = architecture.block_of(name), tuple(tensor.shape)
        if leaf in module._buffers:
            source.load(model, lambda n, name=name: n == name)  # type: ignore[misc]
            if block is None and shape[-1:] == (vocabulary,):  # of the logits
                module._buffers[leaf] = module._buffers[leaf][..., :_ROWS]  # type: ignore[index]
            continue
        if block is None and shape[:1] == (vocabulary,):
            shape = (_ROWS, *shape[1:])
        key: tuple[Any, ...] = (name,)
        if block is not None:
            inner = without_expert(name, architecture).removeprefix(block)
            key = (type(model.get_submodule(block)), inner, shape)
        if key not in shared:
            shared[key] = _random(shape, generator).to(source.device)
        assign([(module, leaf, name)], shared[key])
    return model


def tokens(model: PreTrainedModel) -> torch.Tensor:
    """A few token ids, int64 ``[1, tokens]``, that a probe has embeddings for."""
    weight = model.get_input_embeddings().get_parameter("weight")
    generator = torch.Generator().manual_seed(1)
    return torch.randint(min(3, len(weight) - 1), len(weight), (1, _TOKENS), generator=generator).to(weight.device)


@torch.no_grad()
def trace(model: nn.Module, architecture: Architecture, batch: torch.Tensor) -> Trace:
    """Run the model on token ids ``[1, tokens]`` and keep what its modules were handed and returned.

    Raises:
        PreflightError: the model's own code failed.
    """
    found = Trace()
    with _listening(model, set(architecture.blocks), found):
        try:
            model(**model_inputs(model, batch))
        except Exception as error:  # whatever the model's code raises
            reason = " ".join(str(error).split())
            raise PreflightError(
                f"{type(model).__name__} cannot be tried out on a few tokens ({type(error).__name__}: {reason}), and "
                "without that nothing is known of its residual stream; use a recipe without transforms"
            ) from error
    return found


def without_expert(name: str, architecture: Architecture) -> str:
    """The name with the number of an expert taken out: what its siblings have in common."""
    layer = name.rpartition(".")[0]
    if name in architecture.routed or layer in architecture.routed:
        return re.sub(r"\.\d+\.(?!.*\.\d+\.)", ".*.", name)
    return name


def matrix(module: nn.Module) -> torch.Tensor | None:
    """The weight of a module that multiplies by one, as ``[..., out, in]``; of a router or fused experts too."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim < 2 or isinstance(module, nn.Embedding):
        return None
    return weight.T if isinstance(module, Conv1D) else weight


def _vocabulary(model: PreTrainedModel) -> int:
    """How many rows an embedding has that can do with fewer; 0 if there is none."""
    rows, width = model.get_input_embeddings().get_parameter("weight").shape
    return rows if rows > max(_ROWS, width) else 0


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) < 2:
        return torch.rand(shape, generator=generator) + 0.5
    return torch.randn(shape, generator=generator) * shape[-1] ** -0.5


@contextmanager
def _listening(model: nn.Module, blocks: set[str], found: Trace) -> Iterator[None]:
    inputs: dict[str, torch.Tensor] = {}

    def before(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _rows(args[0] if args else next(iter(kwargs.values()), None))
            if x is not None and name in blocks:
                found.entries.append((name, x))
            elif x is not None:
                inputs[name] = x

        return hook

    def after(name: str, whole: bool) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            x, y = inputs.pop(name, None), _rows(output)
            if not name:
                found.output = y
            elif x is not None and y is not None:
                kept = slice(None) if whole else slice(1)
                found.calls.append(Call(name, _hashes(x), _hashes(y), x[kept].clone(), y[kept].clone()))

        return hook

    def hooks() -> Iterator[RemovableHandle]:
        for name, module in model.named_modules():
            if name in blocks or "weight" in module._parameters or not any(module.children()):
                yield module.register_forward_pre_hook(before(name), with_kwargs=True)
            if name not in blocks and (not name or "weight" in module._parameters or not any(module.children())):
                yield module.register_forward_hook(after(name, matrix(module) is None))

    with hooked(hooks()):
        yield


def _rows(value: Any) -> torch.Tensor | None:
    """The first tensor of what a module was handed or returned, as float32 rows ``[tokens, width]``."""
    if not isinstance(value, torch.Tensor):
        try:
            value = value[0]
        except (TypeError, KeyError, IndexError):
            return None
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or not value.is_floating_point():
        return None
    return value.detach().float().reshape(-1, value.shape[-1]).clone()


def _hashes(rows: torch.Tensor) -> tuple[int, ...]:
    return tuple(hash(row.tobytes()) for row in rows.contiguous().cpu().numpy())
