"""A source whose weights are rotated as they are loaded: see :mod:`quantlab.transforms.hadamard`.

Each tensor is rotated by itself, whatever else is loaded or not: all that it needs of others are the gains of the
norms, which are kept. So a twin, a part of a block, or a block loaded again after an interruption are the same bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantlab.checkpoint.placement import assign, selected
from quantlab.checkpoint.skeleton import untie
from quantlab.checkpoint.source import ModelSource, Select
from quantlab.engine.architecture import Architecture
from quantlab.engine.probe import Trace, matrix, probe, tokens, trace
from quantlab.engine.residual import ResidualStream, StreamNorm, ValueHeads, find_stream, find_value_heads
from quantlab.errors import PreflightError
from quantlab.numerics.orthogonal import rotation
from quantlab.transforms.hadamard import Hadamard, rotate_vectors, rotate_weight

# Of the norm of what is compared, in float32. A layer that is left out of a rotation makes errors of a tenth and more.
_TOLERANCE = 1e-3
# A norm's bias is kept as bias / gain, rotated: one that is far larger than the normalized inputs drowns them.
_LARGEST_BIAS = 64.0


@dataclass(frozen=True, eq=False)
class Turn:
    """What happens to one module's tensors.

    Attributes:
        inputs: the rotation of its inputs, or of an embedding's rows; float64.
        outputs: the rotation of its outputs.
        gain: of the norm that it reads, or its own; float64.
        neutral: for a norm, the weight that stands for a gain of one; None for anything else.
    """

    inputs: torch.Tensor | None = None
    outputs: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    neutral: float | None = None

    def of(self, module: nn.Module, leaf: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor ``leaf`` of the module, rotated, in its own dtype."""
        if self.neutral is not None:
            if leaf == "weight":
                return torch.full_like(tensor, self.neutral)
            assert self.gain is not None and self.inputs is not None  # noqa: PT018
            return rotate_vectors(_bias_over_gain(tensor, self.gain), self.inputs).to(tensor.dtype)
        if leaf == "weight":
            turned = isinstance(module, Conv1D)
            weight = rotate_weight(
                tensor.T if turned else tensor, gain=self.gain, inputs=self.inputs, outputs=self.outputs
            )
            return (weight.T if turned else weight).contiguous()
        if leaf == "bias" and self.outputs is not None:
            return rotate_vectors(tensor.double(), self.outputs).to(tensor.dtype)
        return tensor


class RotatedSource(ModelSource):
    """Another source's model, rotated; made by :func:`rotate`.

    Args:
        source: the original.
        turns: what happens to which module.
        untied: names of weights that are tied in the original and no longer.
        notes: what a person should know.
    """

    def __init__(
        self, source: ModelSource, turns: dict[str, Turn], untied: tuple[str, ...], notes: tuple[str, ...] = ()
    ) -> None:
        self.source, self.folder, self.dtype = source, source.folder, source.dtype
        self.notes = notes
        self._turns, self._untied = turns, untied
        self._original = source.skeleton()  # stays empty: where an untied weight is loaded by its original's ties
        self.config = copy.deepcopy(source.config)
        if untied:
            self.config.tie_word_embeddings = False

    def skeleton(self) -> PreTrainedModel:
        """See :meth:`ModelSource.skeleton`; a head that was tied to an embedding is not."""
        model = self.source.skeleton()
        untie(model, self._untied)
        if self._untied:
            model.config.tie_word_embeddings = False
        return model

    def load(self, model: nn.Module, select: Select = "") -> None:
        """See :meth:`ModelSource.load`."""
        empty = [places for tensor, places in selected(model, select) if tensor.is_meta]
        own = {name for places in empty for _, _, name in places if name in self._untied}
        rest = {name for places in empty for _, _, name in places} - own
        self.source.load(model, lambda name: name in rest)
        for places in empty:
            module, leaf, name = places[0]
            tensor = self._fetch(name) if name in own else getattr(module, leaf).data
            turn = next((self._turns[_owner(n)] for _, _, n in places if _owner(n) in self._turns), None)
            assign(places, tensor if turn is None else turn.of(module, leaf, tensor))

    def fingerprint(self) -> str:
        """The original's: how it is rotated is in the recipe."""
        return self.source.fingerprint()

    def _fetch(self, name: str) -> torch.Tensor:
        return _read(self.source, self._original, [name])[name]


def rotate(source: ModelSource, architecture: Architecture, hadamard: Hadamard) -> RotatedSource:
    """The source's model, rotated.

    What reads and writes is found with a probe, and rotating the probe is the proof: its streams must be rotated and its
    output unchanged.

    Raises:
        PreflightError: the model cannot be rotated; names the block and why.
    """
    model = probe(source, architecture)
    batch = tokens(model)
    before = trace(model, architecture, batch)
    stream = find_stream(model, architecture, before) if hadamard.residual else None
    if stream is not None:
        _check_reached(architecture, before)
    heads: tuple[ValueHeads, ...] = ()
    head_width = _head_width(source) if hadamard.value_heads else None
    if head_width is not None:
        heads = find_value_heads(model, architecture, before, head_width)

    turns = _turns(stream, hadamard.seed, _gains(stream, dict(model.named_parameters()))) if stream else {}
    if stream is not None:
        _turn_probe(model, turns)
        after = trace(model, architecture, batch)
        _check_rotated(architecture, stream, turns[stream.norms[0].name].inputs, before, after)
    notes = []
    if hadamard.value_heads:
        on_heads = _head_turns(heads, hadamard.seed)
        _turn_probe(model, on_heads)
        if not heads or not _same(before.output, trace(model, architecture, batch).output):
            heads, reason = (), "the values of its heads are not rotated: no layer makes them, and them alone"
            if stream is None:
                raise PreflightError(f"transform 'hadamard': {_class(source)}: {reason}; remove the transform")
            notes.append(reason)

    if stream is not None:
        turns = _turns(stream, hadamard.seed, _real_gains(source, stream))
    for name, turn in _head_turns(heads, hadamard.seed).items():
        turns[name] = replace(turns.get(name, turn), **{k: v for k, v in vars(turn).items() if v is not None})
    return RotatedSource(source, turns, _untied(source, turns), tuple(notes))


def _turns(stream: ResidualStream, seed: int, gains: dict[str, torch.Tensor]) -> dict[str, Turn]:
    """R1 folded into everything that touches the stream."""
    keep_ones = any(norm.centred for norm in stream.norms)
    r1 = rotation(stream.width, seed, keep_ones=keep_ones)
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
    rotations: dict[int, torch.Tensor] = {}
    for pair in heads:
        r2 = rotations.setdefault(pair.width, rotation(pair.width, seed))
        turns |= {pair.values: Turn(outputs=r2), pair.output: Turn(inputs=r2)}
    return turns


def _gains(stream: ResidualStream, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    gains: dict[str, torch.Tensor] = {}
    for norm in stream.norms:
        weight = parameters.get(f"{norm.name}.weight")
        gains[norm.name] = torch.ones(stream.width).double() if weight is None else weight.double() + norm.offset
    return gains


def _real_gains(source: ModelSource, stream: ResidualStream) -> dict[str, torch.Tensor]:
    """The gains of the model itself; its norms' biases are looked at, too.

    Raises:
        PreflightError: a bias that cannot be kept behind a gain of one.
    """
    model = source.skeleton()
    names = [f"{norm.name}.{leaf}" for norm in stream.norms for leaf in ("weight", "bias")]
    tensors = _read(source, model, [name for name in names if name in dict(model.named_parameters())])
    gains = _gains(stream, tensors)
    for norm in stream.norms:
        bias = tensors.get(f"{norm.name}.bias")
        if bias is not None:
            size = float(_bias_over_gain(bias, gains[norm.name]).square().mean().sqrt())
            if not size <= _LARGEST_BIAS:
                raise PreflightError(
                    f"{norm.name}: transform 'hadamard' keeps a norm's bias divided by its gains, and some of these are "
                    f"(almost) zero: {size:.3g} on average, at most {_LARGEST_BIAS:g}; rotate the heads alone: "
                    "--set transforms.hadamard.residual=false"
                )
    return gains


def _bias_over_gain(bias: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return torch.where(bias == 0, 0.0, bias.double() / gain)


def _turn_probe(model: nn.Module, turns: dict[str, Turn]) -> None:
    """Rotate a probe's weights; blocks that share one get one that they share."""
    done: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
    for name, turn in turns.items():
        module = model.get_submodule(name)
        for leaf in ("weight", "bias"):
            tensor = module._parameters.get(leaf)
            if tensor is None:
                continue
            key = (id(tensor), id(turn.inputs), id(turn.outputs), id(turn.gain))
            if key not in done:  # with what it was made of, so that no other tensor gets its id
                done[key] = (tensor, turn.of(module, leaf, tensor.data))
            assign([(module, leaf, name)], done[key][1])


def _check_reached(architecture: Architecture, seen: Trace) -> None:
    reached = {name for name, _ in seen.entries}
    unreached = [block for block in architecture.blocks if block not in reached]
    if unreached:
        raise PreflightError(
            f"{unreached[0]}: transform 'hadamard' cannot rotate the residual stream of a model with blocks that text "
            "does not reach: what they hand to the others would have to be rotated too" + _REMEDY
        )


_REMEDY = "; remove the transform, or rotate the heads alone: --set transforms.hadamard.residual=false"


def _check_rotated(
    architecture: Architecture, stream: ResidualStream, r1: torch.Tensor | None, before: Trace, after: Trace
) -> None:
    """Raise unless every block of the rotated probe got its rotated input, and the output is the same."""
    assert r1 is not None
    culprit = "what comes before the blocks"
    for (block, x), (_, y) in zip(before.entries, after.entries, strict=True):
        if x.shape != y.shape or x.shape[1] != stream.width or not _same((x.double() @ r1).float(), y):
            break
        culprit = block
    else:
        if _same(before.output, after.output):
            return
        last = culprit
        culprit = f"{last} or what comes after the blocks"
        stream = replace(stream, unread=tuple(n for n in stream.unread if architecture.block_of(n) in (last, None)))
    raise PreflightError(
        f"{culprit}: transform 'hadamard' cannot rotate the residual stream here: the result would differ"
        f"{_why(architecture, stream, culprit)}{_REMEDY}"
    )


def _why(architecture: Architecture, stream: ResidualStream, culprit: str) -> str:
    """The likely reason."""
    here = [name for name in stream.unread if (architecture.block_of(name) or culprit).startswith(culprit.split()[0])]
    if here:
        return f", because {here[0]} normalizes what is added to the stream, or the stream itself, and no layer reads it"
    return ", because something other than linear layers and embeddings reads or writes it"


def _same(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
    assert x is not None and y is not None  # noqa: PT018
    return bool((x - y).norm() <= _TOLERANCE * x.norm())


def _untied(source: ModelSource, turns: dict[str, Turn]) -> tuple[str, ...]:
    """Tied weights that are rotated in different ways, but for the first of each.

    Raises:
        PreflightError: other weights are tied too, and config.json has one word for all.
    """
    model = source.skeleton()
    tied = [[name for _, _, name in places] for _, places in selected(model) if len(places) > 1]
    apart = [name for names in tied for name in names[1:] if not _alike(turns, names[0], name)]
    together = [name for names in tied for name in names[1:] if name not in apart]
    if apart and together:
        raise PreflightError(
            f"{apart[0]}: transform 'hadamard' unties it from {_partner(tied, apart[0])}, but cannot while {together[0]} "
            "stays tied" + _REMEDY
        )
    return tuple(apart)


def _partner(tied: list[list[str]], name: str) -> str:
    return next(names[0] for names in tied if name in names)


def _alike(turns: dict[str, Turn], one: str, other: str) -> bool:
    a, b = turns.get(_owner(one), Turn()), turns.get(_owner(other), Turn())
    return a.inputs is b.inputs and a.outputs is b.outputs and a.gain is b.gain and a.neutral == b.neutral


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _read(source: ModelSource, model: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """These tensors of an original that is otherwise empty, and stays so."""
    wanted = set(names)
    source.load(model, lambda name: name in wanted)
    tensors = {name: model.get_parameter(name).data for name in names}
    source.unload(model, lambda name: name in wanted)
    return tensors


def _head_width(source: ModelSource) -> int | None:
    config = source.config.get_text_config()
    width, heads = (getattr(config, key, None) for key in ("head_dim", "num_attention_heads"))
    if width is None and isinstance(heads, int) and heads:
        width = getattr(config, "hidden_size", 0) // heads
    return width if isinstance(width, int) and width > 0 else None


def _class(source: ModelSource) -> str:
    return (source.config.architectures or [type(source.config).__name__])[0]
