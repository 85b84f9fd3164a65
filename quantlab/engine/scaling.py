"""Which inputs of a block's layers can be rescaled, and the folding that does it. Nothing here asks for a model's name.

A *producer* makes the inputs: a norm, or a linear layer whose outputs reach the next one through nothing but products
with something else (up to down) and sums over tokens (values to the output of attention). Divide its channels by s and
multiply the columns of whoever reads them by s, and the block computes what it did before.

Where that holds is found by trying it, on a copy of the block: scale the producer's channels, each by a factor of its
own, and see whose inputs turn out to be scaled by just these factors; then fold, and see whether the block's output is
what it was. A reader that was overlooked, a router or a residual stream, would show.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantlab.engine.architecture import features, get_weight, is_linear
from quantlab.engine.forward import Call
from quantlab.engine.trial import Trial, distance, first_layers
from quantlab.experts import UnfusedExperts

# How much folding may change a block's output, in units of the change that one half of it, the producer's, makes.
_EXACT = 1e-3
# How far a column may be from a multiple of itself.
_PROPORTIONAL = 1e-3
# Derivatives are tried in so many random directions.
_DIRECTIONS = 3


@dataclass(frozen=True, eq=False)
class ScalePair:
    """A producer and all who read what it makes, by their names in the block.

    Attributes:
        producer: a norm or a linear layer.
        consumers: linear layers, and other modules whose weight is ``[.., in]`` (routers).
        channels: int64 ``[in]``, which of the producer's channels each input of the consumers is a multiple of.
        count: how many channels the producer has.
        offset: what a norm adds to its weight before it multiplies: 1 where a weight of zero means no change.
    """

    producer: str
    consumers: tuple[str, ...]
    channels: torch.Tensor
    count: int
    offset: float = 0.0


def find_pairs(block: nn.Module, call: Call) -> tuple[ScalePair, ...]:
    """Everything in a block that can be rescaled; a layer is a consumer in one pair at most.

    Args:
        block: as it is called, on any device; its weights are not looked at.
        call: the arguments of a call, with a few tokens.

    Raises:
        Exception: whatever the block's code raises when it is called by itself.
    """
    trial = Trial.of(block, call)
    output, inputs = trial.run()
    modules = dict(trial.block.named_modules())
    pairs: list[ScalePair] = []
    taken: set[str] = set()
    for producer in trial.order:
        untaken = {name: x for name, x in inputs.items() if name not in taken and name != producer}
        for offset, factors in _attempts(trial, producer, untaken):
            pair = _try(trial, producer, offset, factors, output, untaken)
            if pair is not None:
                taken.update(pair.consumers)
                pairs += _for_each_expert(pair, modules)
                break
    return tuple(pairs)


def fold(block: nn.Module, pair: ScalePair, scales: torch.Tensor) -> torch.Tensor:
    """Divide the producer's channels by ``scales`` and multiply the consumers' columns by them, in place.

    What rounding makes of a norm's weight changes every input alike, so the consumers take the quotient of what the
    weight was and what it is now.

    Args:
        block: whose own tensors change.
        pair: found in it.
        scales: positive, float32 ``[count]``.

    Returns:
        What the consumers' inputs are divided by now, float32 ``[in]``.
    """
    producer = block.get_submodule(pair.producer)
    before = producer.get_parameter("weight").float() + pair.offset
    _multiply(producer, 1 / scales, pair.offset)
    if before.ndim == 1:
        after = producer.get_parameter("weight").float() + pair.offset
        scales = torch.where((after == 0) | (before == 0), scales, before / after)
    divisors = scales[pair.channels]
    for name in pair.consumers:
        _multiply_columns(block.get_submodule(name), divisors)
    return divisors


def _attempts(trial: Trial, producer: str, inputs: dict[str, torch.Tensor]) -> Iterator[tuple[float, torch.Tensor]]:
    """What might show a producer: what is added to its weight, and a factor for each channel, 1 for one that stays."""
    module = trial.block.get_submodule(producer)
    if is_linear(module):
        factors = _factors(features(module)[0]).to(trial.device)
        yield 0.0, factors
        for reader in [name for name in trial.order if name in inputs]:
            multiplied = _multiplied(trial, module, reader)
            if multiplied is not None:
                yield 0.0, torch.where(multiplied, factors, 1)
                break
    elif (weight := module._parameters.get("weight")) is not None and weight.ndim == 1:
        yield from ((offset, _factors(len(weight)).to(trial.device)) for offset in (0.0, 1.0))


def _factors(count: int) -> torch.Tensor:
    """Factors from 1/2 to 2 in an order without a pattern, each as far as can be from all others and from 1."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    return torch.exp2(2 * (order + 0.25) / count - 1)


def _multiplied(trial: Trial, producer: nn.Module, reader: str) -> torch.Tensor | None:
    """Which outputs of a linear layer do nothing to a reader's inputs but multiply them, bool ``[out]``.

    Of a layer that makes queries, keys and values at once these are the values. Scaling one such output changes each
    column of the inputs along itself alone: in any direction orthogonal to every column the derivative is zero.
    None if the reader does not depend on the layer, or all its outputs do other things.
    """
    parameters: list[torch.Tensor] = [parameter.requires_grad_() for parameter in producer.parameters()]
    try:
        with torch.enable_grad():
            x = trial.run()[1][reader]
            if not x.requires_grad:
                return None
            generator = torch.Generator().manual_seed(2)
            anywhere = [torch.randn(x.shape, generator=generator).to(x.device) for _ in range(_DIRECTIONS)]
            across = [u - x.detach() * ((u * x).sum(0) / x.square().sum(0)).detach() for u in anywhere]
            moved = [_derivative(producer, parameters, x, u) for u in anywhere]
            bent = [_derivative(producer, parameters, x, u) for u in across]
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    size = torch.stack(moved).abs().amax(0)
    rows = (torch.stack(bent).abs().amax(0) <= _PROPORTIONAL * size.mean()) & (size > 0)
    return rows if bool(rows.any()) and not bool(rows.all()) else None


def _derivative(
    producer: nn.Module, parameters: list[torch.Tensor], x: torch.Tensor, direction: torch.Tensor
) -> torch.Tensor:
    """Of ``<x, direction>`` by the logarithm of a factor of each output of a linear layer, ``[out]``."""
    grads = torch.autograd.grad(x, parameters, direction, retain_graph=True)
    products = [parameter.detach() * grad for parameter, grad in zip(parameters, grads, strict=True)]
    transposed = isinstance(producer, Conv1D)
    return sum((p if p.ndim == 1 else p.sum(0 if transposed else 1) for p in products), x.new_zeros(()))


def _try(
    trial: Trial,
    producer: str,
    offset: float,
    factors: torch.Tensor,
    output: list[torch.Tensor],
    inputs: dict[str, torch.Tensor],
) -> ScalePair | None:
    """The pair that a producer makes with those readers whose inputs follow its channels, if folding is exact."""
    module = trial.block.get_submodule(producer)
    if len(factors) < 2:
        return None
    with _restored(module):
        _multiply(module, factors, offset)
        changed, scaled = trial.run()
        followed = {
            name: channels
            for name, x in inputs.items()
            if (channels := _followed(x, scaled.get(name), factors)) is not None
        }
        if not followed:
            return None
        channels = next(iter(followed.values()))
        if any(not torch.equal(channels, other) for other in followed.values()):
            return None
        readers = [_first_reader(trial.readers[name]) for name in followed]
        with _restored(*readers):
            for reader in readers:
                _multiply_columns(reader, 1 / factors[channels])
            folded, _ = trial.run()
    if not distance(folded, output) <= _EXACT * distance(changed, output):
        return None
    return ScalePair(producer, tuple(followed), channels, len(factors), offset)


def _followed(x: torch.Tensor, scaled: torch.Tensor | None, factors: torch.Tensor) -> torch.Tensor | None:
    """Which factor each column of ``x`` was multiplied by to give ``scaled``; None if one was not, or stayed zero."""
    if scaled is None or x.shape != scaled.shape:
        return None
    energy = x.square().sum(0)
    ratio = (x * scaled).sum(0) / energy
    off = (scaled - ratio * x).square().sum(0)
    if not bool((off <= _PROPORTIONAL**2 * energy).all()) or not bool((energy > 0).all()):
        return None
    ordered, order = factors.sort()
    at = torch.searchsorted(ordered, ratio).clamp(1, len(ordered) - 1)
    nearest = torch.where(ratio - ordered[at - 1] < ordered[at] - ratio, at - 1, at)
    step = 2 ** (2 / len(factors)) - 1  # from one factor to the next
    close = (ratio / ordered[nearest] - 1).abs() <= min(_PROPORTIONAL, step / 8)
    moved = ordered[nearest] != 1  # a channel that stayed explains nothing
    return order[nearest] if bool((close & moved).all()) else None


def _for_each_expert(pair: ScalePair, modules: dict[str, nn.Module]) -> list[ScalePair]:
    """What was found for the first expert of a mixture, or for a mixture as a whole, for each expert."""
    consumers: list[str] = []
    for name in pair.consumers:
        module = modules[name]
        named = [f"{name}.{layer}" for layer in first_layers(module)] if isinstance(module, UnfusedExperts) else [name]
        consumers += named
    parents = {name: name.rpartition(".0.")[0] for name in (pair.producer, *pair.consumers)}
    mixtures = {parent for parent in parents.values() if isinstance(modules.get(parent), UnfusedExperts)}
    if not mixtures:
        return [ScalePair(pair.producer, tuple(consumers), pair.channels, pair.count, pair.offset)]
    if len(mixtures) > 1 or len(set(parents.values())) > 1:
        return []  # one expert alone cannot stand for the others
    mixture = mixtures.pop()
    experts = modules[mixture]
    assert isinstance(experts, UnfusedExperts)

    def of(name: str, expert: int) -> str:
        return f"{mixture}.{expert}.{name.removeprefix(f'{mixture}.0.')}"

    return [
        ScalePair(of(pair.producer, e), tuple(of(name, e) for name in consumers), pair.channels, pair.count)
        for e in range(experts.num_experts)
    ]


def _first_reader(reader: nn.Module) -> nn.Module:
    """The module whose columns are scaled: of a mixture, whose experts share their weights here, the first expert's."""
    return reader.get_submodule(first_layers(reader)[0]) if isinstance(reader, UnfusedExperts) else reader


def _multiply(producer: nn.Module, by: torch.Tensor, offset: float) -> None:
    """Multiply a producer's channels, in place."""
    if is_linear(producer):
        weight = get_weight(producer)
        weight.copy_(weight.float() * by.unsqueeze(1))
    else:
        weight = producer.get_parameter("weight").data
        weight.copy_((weight.float() + offset) * by - offset)
    bias = producer._parameters.get("bias")
    if bias is not None:
        bias.data.copy_(bias.float() * by)


def _multiply_columns(consumer: nn.Module, by: torch.Tensor) -> None:
    weight = get_weight(consumer)
    weight.copy_(weight.float() * by)


@contextmanager
def _restored(*modules: nn.Module) -> Iterator[None]:
    """Undo, at the end, whatever is done to the modules' parameters in between."""
    kept = [(parameter, parameter.data.clone()) for module in modules for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, value in kept:
            parameter.data.copy_(value)
