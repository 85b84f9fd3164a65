"""How much an error of a layer's output is felt at the model's end: one coefficient a layer, from one backward pass.

If a layer's output ``z`` is off by a small ``e``, the model's predictions move by

    KL = 1/2 E[(g . e)^2],    g = d log p(y) / dz,    y drawn from the model's own predictions,

because the second derivative of KL is the Fisher information. With errors of outputs that are as good as independent of
each other, as rounding leaves them, that is ``1/2 E[g_r^2 e_r^2]`` summed over outputs r. A token's error is large
where its input is: of an error ``E`` that is white in the metric of the inputs' second moment H, as GPTQ's nearly is,
it goes with the leverage ``x^T H^-1 x``. So

    KL = 1/2 E[|g|^2 x^T H^-1 x] / (outputs * inputs) * tr(E H E^T):

the loss is linear in the layer's squared output error, as HIGGS found by injecting noise (arXiv:2411.17525), and one
backward pass gives the coefficients of all layers, where noise takes a forward pass for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quantlab.allocation.resumed import ResumedDivergence
from quantlab.allocation.task import Tell
from quantlab.engine.hooks import hooked
from quantlab.quantizers.factor import factorize

# Tokens whose activations are held for the backward pass at once.
_BATCH_TOKENS = 1024
# Of injected noise, relative to the weight: about what four bits leave.
_NOISE = 0.1
_DAMPING = 0.01


def coefficients(
    model: PreTrainedModel, layers: list[str], tokens: torch.Tensor, *, seed: int = 0, tell: Tell | None = None
) -> dict[str, float]:
    """Nats a token for a unit of each layer's mean squared output error (summed over outputs).

    Args:
        model: in memory, gradients off.
        layers: names of linear layers or embeddings.
        tokens: int64 ``[sequences, length]``, where the model is.
        seed: of the labels that are drawn.
        tell: told of each batch.

    Returns:
        A coefficient for each layer; 0 for one that no token went through.
    """
    generator = torch.Generator(tokens.device).manual_seed(seed)
    squares: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> Callable[..., None]:
        def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[name].append(args[0].detach())  # layers that share an input share its memory

        return before

    def take(name: str, gradient: torch.Tensor) -> None:
        squares[name].append(gradient.float().square().mean(-1).flatten())

    with hooked(model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in layers):
        batches = tokens.split(max(1, _BATCH_TOKENS // tokens.shape[1]))
        for number, batch in enumerate(batches):
            if tell is not None:
                tell(number, len(batches), f"gradients of {tokens.numel():,} tokens")
            backward(model, layers, batch, generator, take)
    known: dict[tuple[tuple[int, torch.Size], ...], torch.Tensor] = {}
    found = {}
    for name in layers:
        felt = torch.cat(squares[name]) if squares[name] else torch.zeros(0)
        key = tuple((x.data_ptr(), x.shape) for x in inputs[name])
        if key not in known:
            known[key] = _leverage(inputs[name])
        # Of rows that were routed elsewhere nothing is felt: the mean is over all tokens, like the errors' energies.
        weight = known[key] if len(known[key]) == len(felt) else torch.ones_like(felt)
        found[name] = float((felt * weight).sum()) / 2 / tokens.numel()
    return found


def _leverage(inputs: list[torch.Tensor]) -> torch.Tensor:
    """``x^T H^-1 x`` of each row of ``inputs``, over its mean; 1 for token ids."""
    if not inputs:
        return torch.zeros(0)
    if not inputs[0].is_floating_point():
        return torch.ones(sum(ids.numel() for ids in inputs), device=inputs[0].device)
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]).float()
    if not len(rows):
        return torch.zeros(0, device=rows.device)
    factor, _ = factorize(rows.T @ rows / len(rows), _DAMPING)
    found = torch.linalg.solve_triangular(factor, rows.T, upper=True).square().sum(0)
    return found / found.mean().clamp(min=torch.finfo(torch.float32).tiny)


def injected(
    divergence: ResumedDivergence, layers: Sequence[str], *, seed: int = 0, tell: Tell | None = None
) -> dict[str, float]:
    """The same by injecting noise, as HIGGS does: a forward pass from each layer on, and nothing assumed of gradients.

    Args:
        divergence: the model, and the text that it is measured on.
        layers: names of linear layers.
        seed: of the noise: white, a hundredth of the weight's energy.
        tell: told of each layer.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for number, name in enumerate(layers):
        if tell is not None:
            tell(number, len(layers), f"noise in {name}")
        weight = divergence.weight(name)
        size = _NOISE * weight.float().square().mean().sqrt()
        noise = size * torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(weight.device)
        squares: list[float] = []

        def measure(
            module: nn.Module,
            args: tuple[Any, ...],
            noise: torch.Tensor = noise,
            squares: list[float] = squares,
        ) -> None:
            rows = noise[args[0].flatten()] if isinstance(module, nn.Embedding) else args[0].float() @ noise.T
            squares.append(float(rows.square().sum()))

        with divergence.model.get_submodule(name).register_forward_pre_hook(measure):
            loss = divergence.of({name: weight + noise.to(weight.dtype)})
        energy = sum(squares) / divergence.tokens.numel()
        found[name] = max(0.0, loss) / energy if energy else 0.0
    return found


def backward(
    model: PreTrainedModel,
    layers: list[str],
    batch: torch.Tensor,
    generator: torch.Generator | None,
    take: Callable[[str, torch.Tensor], None],
) -> float:
    """One forward and backward pass of the sum of the tokens' negative log-likelihoods.

    Args:
        model: in memory, gradients off.
        layers: whose outputs' gradients are wanted.
        batch: token ids ``[sequences, length]``.
        generator: labels are drawn from the model's predictions; None: they are the text's own next tokens.
        take: given each layer's name and the gradient at its output.

    Returns:
        The sum.
    """

    def listen(name: str) -> Callable[..., None]:
        def after(_module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: take(name, gradient))

        return after

    def differentiable(_module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_()

    # The first hook of a module is called first: an embedding's own gradient is taken from what is made differentiable.
    first = [model.get_input_embeddings().register_forward_hook(differentiable)]
    listening = (model.get_submodule(name).register_forward_hook(listen(name)) for name in layers)
    with hooked(chain(first, listening)), torch.enable_grad():
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        if generator is None:
            labels = batch[:, 1:].flatten()
        else:
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        loss.backward()
    return float(loss.detach())
