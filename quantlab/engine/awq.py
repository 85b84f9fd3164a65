"""AWQ in the run: what a sample shows of a block's inputs, and the scales that follow folded into the block.

A sample of the calibration tokens goes one block ahead of the batches, through original weights all the way. What it
shows of a block does not depend on what became of the blocks before, so a run that goes on where another was killed
finds the same scales.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from quantlab.engine.architecture import get_weight
from quantlab.engine.forward import Call
from quantlab.engine.scaling import ScalePair, find_pairs, fold
from quantlab.engine.solve import PlannedLayer
from quantlab.transforms import Awq, Reader

# Tokens of one sequence in the sample: several short ones are more alike to all than a long one.
_LENGTH = 256


@dataclass(frozen=True, eq=False)
class Ahead:
    """What is known of a block before the batches enter it.

    Attributes:
        call: a call of the block with a few tokens; None if none reaches it.
        inputs: what each of its layers is given, in original form, ``[tokens, in]``.
    """

    call: Call | None
    inputs: dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Rescaled:
    """What was done to a block.

    Attributes:
        divisors: by layer, what its inputs are divided by now, float32 ``[in]``.
        notes: by layer, what a person should know.
    """

    divisors: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


class Rescaling:
    """AWQ for the blocks of one model.

    Args:
        method: the search.
        model: whose blocks will be rescaled in place.
        sample: token ids int64 ``[sequences, length]`` that go ahead.
    """

    def __init__(self, method: Awq, model: nn.Module, sample: torch.Tensor) -> None:
        self.sample = sample
        self._method = method
        self._model = model
        self._pairs: dict[str, tuple[ScalePair, ...] | str] = {}
        places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        # What is used in several places cannot change for one of them.
        self._shared = {
            name.rpartition(".")[0]
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if places[id(parameter)] > 1
        }

    def apply(self, block: str, ahead: Ahead, planned: Sequence[PlannedLayer]) -> Rescaled:
        """Search scales for whatever can be rescaled in a block, and fold them into its weights."""
        module, schemes = self._model.get_submodule(block), {layer.name: layer.scheme for layer in planned}
        rescaled = Rescaled(notes=dict.fromkeys(schemes, "awq: its input cannot be rescaled"))
        pairs = self._pairs_of(module, ahead.call) if schemes else ()
        if isinstance(pairs, str):
            rescaled.notes.update(dict.fromkeys(schemes, f"awq: its block cannot be tried out by itself ({pairs})"))
            return rescaled
        for pair in pairs:
            names = [f"{block}.{name}" for name in pair.consumers]
            if not self._shared.isdisjoint([f"{block}.{pair.producer}", *names]):
                continue
            readers = [
                Reader(get_weight(self._model.get_submodule(name)), ahead.inputs[name], schemes[name])
                for name in names
                if name in schemes and name in ahead.inputs
            ]
            for name in names:
                rescaled.notes.pop(name, None)
                if not readers and name in schemes:
                    rescaled.notes[name] = "awq: no token of the sample reached it"
            scales = self._method.search(readers, pair.channels, pair.count) if readers else None
            if scales is not None:
                rescaled.divisors.update(dict.fromkeys(names, fold(module, pair, scales)))
        return rescaled

    def _pairs_of(self, block: nn.Module, call: Call | None) -> tuple[ScalePair, ...] | str:
        """What can be rescaled in a block, found once for all of its kind; or why that cannot be found."""
        kind = f"{block} {[(name, tuple(parameter.shape)) for name, parameter in block.named_parameters()]}"
        if kind not in self._pairs:
            try:
                self._pairs[kind] = () if call is None else find_pairs(block, call)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever the model's code raises
                self._pairs[kind] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return self._pairs[kind]


def draw_sample(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """About ``count`` of the calibration tokens ``[samples, length]``: the beginnings of sequences from all over."""
    length = min(tokens.shape[1], _LENGTH, count)
    sequences = min(len(tokens), max(1, count // length))
    chosen = torch.arange(sequences) * len(tokens) // sequences
    return tokens[chosen, :length]
