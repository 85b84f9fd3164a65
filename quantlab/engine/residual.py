"""The residual stream of a model: what writes to it and what reads it, and which layers make an attention's values.

Found by running a probe, not by names. A norm is a module that returns its input normalized; a reader is a layer
whose every input row is a row that a norm returned, whatever happened in between (reshaping, picking the
tokens of an expert); a writer is any other layer of a block whose outputs are as wide as the stream. This is a guess,
and a good one; whoever rewrites the weights by it compares the outputs before and after.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from quantlab.engine.architecture import Architecture
from quantlab.engine.probe import Call, Trace, matrix, without_expert


@dataclass(frozen=True)
class StreamNorm:
    """A norm before layers that read the residual stream.

    Attributes:
        name: the module's.
        centred: it subtracts the mean: a LayerNorm, not an RMSNorm.
        offset: its gains are its weight plus this: 0, or 1 as in Gemma.
        readers: the layers that are handed what it returns.
    """

    name: str
    centred: bool
    offset: float
    readers: tuple[str, ...]


@dataclass(frozen=True)
class ResidualStream:
    """The residual stream, by module name.

    Attributes:
        width: of the stream.
        embeddings: whose rows are added up at its start.
        norms: with their readers, the head among them.
        writers: layers whose outputs are added to it.
        unread: norms of its width that no layer reads.
    """

    width: int
    embeddings: tuple[str, ...]
    norms: tuple[StreamNorm, ...]
    writers: tuple[str, ...]
    unread: tuple[str, ...]


@dataclass(frozen=True)
class ValueHeads:
    """The layer that makes an attention's values, and the one that its heads' outputs go into.

    Attributes:
        values: the layer whose outputs are the values, head by head.
        output: the layer whose inputs are sums of them, head by head.
        width: of a head.
    """

    values: str
    output: str
    width: int


def find_stream(model: nn.Module, architecture: Architecture, seen: Trace) -> ResidualStream:
    """Guess the structure of the residual stream from what a probe showed."""
    width = seen.entries[0][1].shape[1]
    kinds: dict[str, tuple[bool, float]] = {}
    norm_of: dict[int, str] = {}
    readers: dict[str, str] = {}
    writers: dict[str, None] = {}
    for call in seen.calls:
        weight = matrix(model.get_submodule(call.name))
        if weight is None:
            kind = _norm_kind(model.get_submodule(call.name), call)
            if kind is not None and call.output.shape[1] == width:
                kinds[call.name] = kind
                norm_of |= dict.fromkeys(call.returned, call.name)
            continue
        norms = {norm_of.get(row) for row in call.rows}
        role = without_expert(call.name, architecture)
        norm = next(iter(norms)) if len(norms) == 1 else None
        if norm is not None and weight.shape[-1] == width:
            readers[role] = norm
        elif weight.shape[-2] == width and architecture.block_of(call.name) is not None:
            writers[role] = None
    # An expert that no token went to is what its siblings are.
    roles = {name: without_expert(name, architecture) for name, _ in model.named_modules()}
    read_by: dict[str, list[str]] = {norm: [] for norm in kinds}
    for name, role in roles.items():
        if role in readers:
            read_by[readers[role]].append(name)
    embeddings = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.embedding_dim == width and architecture.block_of(name) is None
    ]
    return ResidualStream(
        width=width,
        embeddings=tuple(embeddings),
        norms=tuple(StreamNorm(norm, *kinds[norm], tuple(names)) for norm, names in read_by.items() if names),
        writers=tuple(name for name, role in roles.items() if role in writers and role not in readers),
        unread=tuple(norm for norm, names in read_by.items() if not names),
    )


def find_value_heads(architecture: Architecture, seen: Trace, head_width: int) -> tuple[ValueHeads, ...]:
    """Pairs of layers with nothing between them but attention's sums over tokens.

    The first token of a causal model attends to itself alone: what goes into the output layer is, in each head, a
    multiple of that token's value.
    """
    found: list[ValueHeads] = []
    layers = set(architecture.all_layers) - architecture.routed
    earlier: list[Call] = []
    for call in seen.calls:
        if call.name not in layers or (block := architecture.block_of(call.name)) is None:
            continue
        same_block = [other for other in earlier if architecture.block_of(other.name) == block]
        fitting = [other for other in same_block if _is_made_of(call.input[0], other.output[0], head_width)]
        if fitting and not any(pair.output == call.name for pair in found):
            found.append(ValueHeads(fitting[-1].name, call.name, head_width))
        earlier.append(call)
    return tuple(found)


def _norm_kind(module: nn.Module, call: Call) -> tuple[bool, float] | None:
    """Whether it subtracts the mean, and what it adds to its weight; None if it is no norm."""
    x, y = call.input.double(), call.output.double()
    extra = set(module._parameters) - {"weight", "bias"}
    if x.shape != y.shape or x.shape[1] < 2 or extra or any(module.children()):
        return None
    weight, bias = (None if p is None else p.double() for p in map(module._parameters.get, ("weight", "bias")))
    if any(p is not None and p.shape != x.shape[1:] for p in (weight, bias)):
        return None
    for centred in (True, False):
        n = x - x.mean(1, keepdim=True) if centred else x
        n = n / n.square().mean(1, keepdim=True).sqrt()
        for offset in (0.0, 1.0):
            expected = n if weight is None else n * (weight + offset)
            expected = expected if bias is None else expected + bias
            if torch.allclose(y, expected, rtol=0.02, atol=0.02):
                return centred, offset
    return None


def _is_made_of(x: torch.Tensor, value: torch.Tensor, head_width: int) -> bool:
    """Whether each head of ``x`` is a positive multiple of the head of ``value`` that its group shares."""
    if not head_width or x.numel() % head_width or value.numel() % head_width or x.numel() % value.numel():
        return False
    heads, values = x.view(-1, head_width).double(), value.view(-1, head_width).double()
    values = values.repeat_interleave(len(heads) // len(values), 0)
    return bool((nn.functional.cosine_similarity(heads, values) > 1 - 1e-6).all())
