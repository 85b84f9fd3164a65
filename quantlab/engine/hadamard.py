"""Carry out the transform ``hadamard``: find what it touches, prove it on a probe, make the rotated source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from quantlab.checkpoint.placement import assign, selected
from quantlab.checkpoint.source import ModelSource
from quantlab.engine.architecture import Architecture
from quantlab.engine.probe import Trace, matrix, probe, tokens, trace, without_expert
from quantlab.engine.residual import ResidualStream, ValueHeads, find_stream, find_value_heads
from quantlab.engine.rotated import RotatedSource, Turn, bias_over_gain, owner, read_tensors
from quantlab.errors import PreflightError
from quantlab.numerics.orthogonal import Rotation, rotation
from quantlab.transforms import Hadamard

# Of the norm of what is compared, in float32. A layer that is left out of a rotation makes errors of a tenth and more.
_TOLERANCE = 1e-3
# A norm's bias is kept as bias / gain, rotated: one that is far larger than the normalized inputs drowns them.
_LARGEST_BIAS = 64.0
_REMEDY = "remove the transform, or rotate the heads alone: --set transforms.hadamard.residual=false"


def rotate(
    source: ModelSource, architecture: Architecture, hadamard: Hadamard
) -> tuple[RotatedSource, tuple[str, ...]]:
    """The source's model, rotated, and what a person should know of it.

    What reads and writes is found with a probe, and rotating the probe is the proof: its streams must come out rotated
    and its output unchanged.

    Raises:
        PreflightError: the model cannot be rotated; names the block and why.
    """
    model = probe(source, architecture)
    batch = tokens(model)
    before = trace(model, architecture, batch)
    original = source.skeleton()
    turns: dict[str, Turn] = {}
    notes: tuple[str, ...] = ()
    if hadamard.residual:
        _check_reached(model, architecture, before)
        stream = find_stream(model, architecture, before)
        r1 = rotation(stream.width, hadamard.seed, keep_ones=any(norm.centred for norm in stream.norms))
        _turn_probe(model, _stream_turns(stream, r1, _gains(stream, dict(model.named_parameters()), source.device)))
        _check_rotated(architecture, stream, r1, before, trace(model, architecture, batch))
        turns = _stream_turns(stream, r1, _checked_gains(source, original, stream))
    if hadamard.value_heads:
        on_heads = _head_turns(find_value_heads(architecture, before, _head_width(source)), hadamard.seed)
        _turn_probe(model, on_heads)
        if on_heads and _same(before.output, trace(model, architecture, batch).output):
            for name, turn in on_heads.items():
                own = turns.get(name, Turn())
                turns[name] = replace(
                    own,
                    inputs=turn.inputs if own.inputs is None else own.inputs,
                    outputs=turn.outputs if own.outputs is None else own.outputs,
                )
        else:
            notes = ("hadamard: heads are not rotated: no layer of its own makes their values",)
    if not turns:
        raise PreflightError(
            f"{type(model).__name__}: transform 'hadamard' with residual: false finds nothing to rotate: no layer of "
            "its own makes the values of its heads; remove the transform"
        )
    return RotatedSource(source, turns, _untied(original, turns)), notes


def _stream_turns(stream: ResidualStream, r1: Rotation, gains: Mapping[str, torch.Tensor]) -> dict[str, Turn]:
    """R1 folded into everything that touches the stream."""
    turns = {name: Turn(inputs=r1) for name in stream.embeddings}
    turns |= {name: Turn(outputs=r1) for name in stream.writers}
    for norm in stream.norms:
        gain = gains[norm.name]
        turns[norm.name] = Turn(inputs=r1, gain=gain, neutral=1 - norm.offset)
        turns |= {name: Turn(inputs=r1, gain=gain) for name in norm.readers}
    return turns


def _head_turns(heads: Iterable[ValueHeads], seed: int) -> dict[str, Turn]:
    """R2 folded into the layers on both sides of each attention."""
    turns: dict[str, Turn] = {}
    rotations: dict[int, Rotation] = {}
    for pair in heads:
        r2 = rotations.setdefault(pair.width, rotation(pair.width, seed))
        turns |= {pair.values: Turn(outputs=r2), pair.output: Turn(inputs=r2)}
    return turns


def _gains(
    stream: ResidualStream, parameters: Mapping[str, torch.Tensor], device: torch.device
) -> dict[str, torch.Tensor]:
    """The gains of each norm, float64; one tensor for norms that share a weight."""
    gains: dict[str, torch.Tensor] = {}
    ones = torch.ones(stream.width, dtype=torch.float64, device=device)
    of_weight: dict[int, torch.Tensor] = {}
    for norm in stream.norms:
        weight = parameters.get(f"{norm.name}.weight")
        if weight is None:
            gains[norm.name] = ones
        else:
            gains[norm.name] = of_weight.setdefault(weight.data_ptr(), weight.double() + norm.offset)
    return gains


def _checked_gains(source: ModelSource, original: nn.Module, stream: ResidualStream) -> dict[str, torch.Tensor]:
    """The gains of the model itself; its norms' biases are looked at, too.

    Raises:
        PreflightError: a bias that cannot be kept behind a gain of one.
    """
    parameters = {name for name, _ in original.named_parameters()}
    names = [f"{norm.name}.{leaf}" for norm in stream.norms for leaf in ("weight", "bias")]
    tensors = read_tensors(source, original, [name for name in names if name in parameters])
    gains = _gains(stream, tensors, source.device)
    for norm in stream.norms:
        bias = tensors.get(f"{norm.name}.bias")
        if bias is not None:
            size = float(bias_over_gain(bias, gains[norm.name]).square().mean().sqrt())
            if not size <= _LARGEST_BIAS:
                raise PreflightError(
                    f"{norm.name}: transform 'hadamard' keeps a norm's bias divided by its gains, and some gains "
                    f"are (almost) zero: {size:.3g} on average, at most {_LARGEST_BIAS:g}; {_REMEDY}"
                )
    return gains


def _turn_probe(model: nn.Module, turns: dict[str, Turn]) -> None:
    """Rotate a probe's weights; blocks that share one get one that they share."""
    done: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
    for name, turn in turns.items():
        module = model.get_submodule(name)
        for leaf in ("weight", "bias"):
            tensor = module._parameters.get(leaf)
            if tensor is None:
                continue
            key = (tensor.data_ptr(), id(turn.inputs), id(turn.outputs), id(turn.gain))
            if key not in done:  # with what it was made of, so that no other tensor gets its place
                done[key] = (tensor, turn.of(module, leaf, tensor.data))
            assign([(module, leaf, name)], done[key][1])


def _check_reached(model: nn.Module, architecture: Architecture, seen: Trace) -> None:
    """Raise if something that may touch the stream did not run: nothing is known of it, and nothing proves it right."""
    reached = {name for name, _ in seen.entries}
    idle = [block for block in architecture.blocks if block not in reached]
    if not idle:
        width = seen.entries[0][1].shape[1]
        called = {without_expert(call.name, architecture) for call in seen.calls}
        for name, module in model.named_modules():
            weight = matrix(module)
            if weight is not None and width in weight.shape[-2:] and without_expert(name, architecture) not in called:
                idle.append(name)
    if idle:
        raise PreflightError(
            f"{idle[0]}: transform 'hadamard' cannot rotate the residual stream of a model with parts that text alone "
            f"does not reach: what they read from it or write to it would have to be rotated too; {_REMEDY}"
        )


def _check_rotated(
    architecture: Architecture, stream: ResidualStream, r1: Rotation, before: Trace, after: Trace
) -> None:
    """Raise unless every block of the rotated probe got its rotated input, and the output is the same."""
    at_end = True
    behind = ""  # the block whose output is compared next; none yet
    for (block, x), (_, y) in zip(before.entries, after.entries, strict=True):
        at_end = x.shape[1] == stream.width and _same(r1.apply(x.double()).float(), y)
        if not at_end:
            break
        behind = block
    if at_end and _same(before.output, after.output):
        return
    where = behind or "before the blocks"
    if at_end:
        where = f"{behind} or behind it"
    raise PreflightError(
        f"{where}: transform 'hadamard' cannot rotate the residual stream: the model's output would change, because "
        f"{_reason(architecture, stream, behind, at_end)}; {_REMEDY}"
    )


def _reason(architecture: Architecture, stream: ResidualStream, block: str, at_end: bool) -> str:
    """Why, probably: a norm that is not between the stream and its readers."""
    unread = [name for name in stream.unread if (architecture.block_of(name) or "") == block]
    if at_end:
        unread += [name for name in stream.unread if architecture.block_of(name) is None]
        if unread and architecture.block_of(unread[-1]) is None:
            return f"no linear layer behind {unread[-1]} turns it back"
    elif not block:
        read_in_blocks = [norm.name for norm in stream.norms if any(map(architecture.block_of, norm.readers))]
        unread += [name for name in read_in_blocks if architecture.block_of(name) is None]
    if unread:
        return f"{unread[-1]} has gains of its own, and what it returns goes on in the stream"
    return "something other than embeddings, norms and linear layers reads it or writes to it"


def _same(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
    assert x is not None
    assert y is not None
    return x.shape == y.shape and bool((x - y).norm() <= _TOLERANCE * x.norm())


def _untied(original: PreTrainedModel, turns: dict[str, Turn]) -> tuple[str, ...]:
    """Tied weights that are no longer equal once they are rotated, but for those that the others are tied to.

    Raises:
        PreflightError: other weights are tied too, and config.json has one word for all.
    """
    apart: list[str] = []
    together: list[str] = []
    for _, places in selected(original):
        # What is tied to another comes behind it.
        first, *names = sorted((name for _, _, name in places), key=lambda name: name in original.all_tied_weights_keys)
        for name in names:
            (together if _alike(turns, first, name) else apart).append(name)
    if apart and together:
        raise PreflightError(
            f"{apart[0]}: transform 'hadamard' cannot untie it from the embedding and leave {together[0]} tied to it; "
            f"{_REMEDY}"
        )
    return tuple(apart)


def _alike(turns: dict[str, Turn], one: str, other: str) -> bool:
    a, b = turns.get(owner(one), Turn()), turns.get(owner(other), Turn())
    return a.inputs is b.inputs and a.outputs is b.outputs and a.gain is b.gain and a.neutral == b.neutral


def _head_width(source: ModelSource) -> int:
    """Of attention's heads, or 0 if the config does not say."""
    config = source.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // heads if heads else 0)
    return width if isinstance(width, int) else 0
