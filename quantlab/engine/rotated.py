"""A source whose weights are rotated as they are loaded: see :mod:`quantlab.transforms.hadamard`.

Each tensor is rotated by itself, whatever else is loaded or not: all that it needs of others are the gains of the
norms, which are kept. So a twin, a part of a block, or a block loaded again after an interruption are the same bytes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantlab.checkpoint.placement import assign, selected
from quantlab.checkpoint.skeleton import untie
from quantlab.checkpoint.source import ModelSource, Select
from quantlab.numerics.orthogonal import Rotation
from quantlab.transforms.hadamard import rotate_weight


@dataclass(frozen=True, eq=False)
class Turn:
    """What happens to one module's tensors.

    Attributes:
        inputs: the rotation of its inputs, or of an embedding's rows.
        outputs: the rotation of its outputs.
        gain: of the norm that it reads, or its own; float64.
        neutral: for a norm, the weight that stands for a gain of one; None for anything else.
    """

    inputs: Rotation | None = None
    outputs: Rotation | None = None
    gain: torch.Tensor | None = None
    neutral: float | None = None

    def of(self, module: nn.Module, leaf: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor ``leaf`` of the module, rotated, in its own dtype."""
        if self.neutral is not None:
            if leaf == "weight":
                return torch.full_like(tensor, self.neutral)
            assert self.gain is not None
            assert self.inputs is not None
            return self.inputs.apply(bias_over_gain(tensor, self.gain)).to(tensor.dtype)
        if leaf == "weight":
            turned = isinstance(module, Conv1D)
            weight = rotate_weight(
                tensor.T if turned else tensor, gain=self.gain, inputs=self.inputs, outputs=self.outputs
            )
            return (weight.T if turned else weight).contiguous()
        if leaf == "bias" and self.outputs is not None:
            return self.outputs.apply(tensor.double()).to(tensor.dtype)
        return tensor


class RotatedSource(ModelSource):
    """Another source's model, rotated; made by :func:`quantlab.engine.hadamard.rotate`.

    Args:
        source: the original.
        turns: what happens to which module.
        untied: names of weights that are tied in the original and no longer.
    """

    def __init__(self, source: ModelSource, turns: dict[str, Turn], untied: tuple[str, ...]) -> None:
        self.source, self.folder, self.dtype, self.device = source, source.folder, source.dtype, source.device
        self._turns, self._untied = turns, untied
        self._original = source.skeleton()  # stays empty: where an untied weight is loaded by its original's ties
        self.config = copy.deepcopy(source.config)
        if untied:
            self.config.tie_word_embeddings = False  # or from_pretrained would tie them again

    def skeleton(self) -> PreTrainedModel:
        """See :meth:`ModelSource.skeleton`; a head that was tied to an embedding is not."""
        model = self.source.skeleton()
        untie(model, self._untied)
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
            turn = next((self._turns[owner(n)] for _, _, n in places if owner(n) in self._turns), None)
            assign(places, tensor if turn is None else turn.of(module, leaf, tensor))

    def fingerprint(self) -> str:
        """The original's: how it is rotated is in the recipe."""
        return self.source.fingerprint()

    def _fetch(self, name: str) -> torch.Tensor:
        return read_tensors(self.source, self._original, [name])[name]


def bias_over_gain(bias: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """What a norm whose gains are one adds in place of ``bias``: float64; not finite where only the gain is zero."""
    return torch.where(bias == 0, 0.0, bias.double() / gain)


def owner(name: str) -> str:
    """The module of a parameter."""
    return name.rpartition(".")[0]


def read_tensors(source: ModelSource, model: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """These tensors of an original that is otherwise empty, and stays so."""
    wanted = set(names)
    source.load(model, lambda name: name in wanted)
    tensors = {name: model.get_parameter(name).data for name in names}
    source.unload(model, lambda name: name in wanted)
    return tensors
