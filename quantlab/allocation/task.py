"""What every sensitivity is given: the model, the layers, the candidates, some text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from quantlab.checkpoint.source import ModelSource, parameter_bytes
from quantlab.engine.architecture import Architecture
from quantlab.engine.device import free_bytes
from quantlab.engine.footprint import planned_storage, stored_bytes
from quantlab.engine.selection import plan_each
from quantlab.engine.solve import PlannedLayer
from quantlab.errors import PreflightError
from quantlab.recipe import Scheme
from quantlab.variants import Variant

_GIB = 1 << 30
KEPT = "original"
"""The candidate that leaves a layer as it is."""

Tell = Callable[[int, int, str], None]
"""Told of the steps done, the steps in all, and what is being done."""


@dataclass(frozen=True, eq=False)
class Task:
    """Layers to be measured under candidates.

    Attributes:
        source: where weights come from, and on which device they are.
        skeleton: the model on the meta device.
        architecture: its parts.
        names: the layers that take part.
        candidates: ways to quantize; one of format ``none`` leaves a layer as it is.
        plans: by candidate's number, what it does with each layer; without those that cannot be carried out, and
            without the one that does nothing.
        tokens: calibration token ids, int64 ``[samples, length]``, on that device.
        tell: told what happens.
        options: of the sensitivity.
    """

    source: ModelSource
    skeleton: PreTrainedModel
    architecture: Architecture
    names: tuple[str, ...]
    candidates: tuple[Variant, ...]
    plans: Mapping[int, Mapping[str, PlannedLayer]]
    tokens: torch.Tensor
    tell: Tell = lambda _done, _total, _what: None
    options: Mapping[str, object] = field(default_factory=dict)

    def weight(self, name: str) -> torch.Tensor:
        """The weight of a layer, on the meta device."""
        return self.skeleton.get_submodule(name).get_parameter("weight")

    @property
    def kept(self) -> list[int]:
        """Numbers of the candidates that leave a layer as it is."""
        return [number for number, candidate in enumerate(self.candidates) if candidate.scheme.keeps]

    @cached_property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """Layers that take part and share a weight."""
        by_weight: dict[int, list[str]] = {}
        for name in self.names:
            by_weight.setdefault(id(self.weight(name)), []).append(name)
        return tuple(tuple(names) for names in by_weight.values() if len(names) > 1)

    @property
    def tied_seconds(self) -> dict[str, str]:
        """Layers whose weight is that of another one, by name."""
        return {name: names[0] for names in self.tied for name in names[1:]}

    @property
    def bits(self) -> list[int]:
        """Of a code under each candidate, or of a weight that stays as it is."""
        own = 8 * self.source.dtype.itemsize
        return [own if candidate.scheme.keeps else candidate.scheme.bits for candidate in self.candidates]

    def bytes(self) -> dict[str, np.ndarray]:
        """Bytes of each layer under each candidate, everything stored counted; infinite where it cannot be had."""
        found = {name: np.full(len(self.candidates), math.inf) for name in self.names}
        for name in self.names:
            weight = self.weight(name)
            found[name][self.kept] = weight.numel() * weight.element_size()
            for number, plan in self.plans.items():
                found[name][number] = stored_bytes(planned_storage(plan[name]))
        return found

    def weights(self) -> dict[str, int]:
        """How many weights each layer has."""
        return {name: self.weight(name).numel() for name in self.names}

    def refuse_too_large(self, dtype: torch.dtype | None = None, *, twice: bool = False) -> None:
        """Refuse, before an hour is spent, a model that memory cannot hold as a whole; see :meth:`model`.

        Raises:
            PreflightError: says what is needed, what is there, and what takes less.
        """
        size = parameter_bytes(self.skeleton) * (2 if twice else 1)
        if dtype is not None:
            size = size * dtype.itemsize // self.source.dtype.itemsize
        device = self.source.device
        available = psutil.virtual_memory().available if device.type == "cpu" else free_bytes(device)
        if available is not None and size > available:
            where = "in memory" if device.type == "cpu" else f"on {device}"
            raise PreflightError(
                f"this sensitivity holds the whole model {where}, about {size / _GIB:.1f} GiB, and "
                f"{available / _GIB:.1f} GiB are free; use sensitivity error with coefficients none, which holds one "
                "block, or close other programs"
            )

    def model(self, dtype: torch.dtype | None = None, *, twice: bool = False) -> PreTrainedModel:
        """The whole model, as it is, on the source's device.

        Args:
            dtype: None: its own.
            twice: whether as much again will be needed beside it.

        Raises:
            PreflightError: memory cannot hold it.
        """
        self.refuse_too_large(dtype, twice=twice)
        model = self.source.skeleton()
        self.source.load(model)
        if dtype is not None:
            nn.Module.to(model, dtype)
        return model


def spread(total: int, count: int) -> torch.Tensor:
    """``count`` of ``total`` places, at least one, spread evenly: int64."""
    count = min(max(1, count), total)
    return ((torch.arange(count) + 0.5) * total / count).long()


def plan_candidates(
    candidates: Sequence[Variant], names: Sequence[str], architecture: Architecture, skeleton: PreTrainedModel
) -> tuple[dict[int, dict[str, PlannedLayer]], dict[int, str]]:
    """What each candidate does with each layer, by its number; or why it cannot.

    Embeddings, which :func:`plan_each` does not ask for, have one row a token.
    """
    numbered = [number for number, candidate in enumerate(candidates) if not candidate.scheme.keeps]
    schemes: list[Scheme] = [candidates[number].scheme for number in numbered]
    plans, refused = plan_each(schemes, names, architecture, skeleton)
    return (
        {numbered[place]: plan for place, plan in plans.items()},
        {numbered[place]: reason for place, reason in refused.items()},
    )


def as_variant(scheme: Scheme) -> Variant:
    """The candidate that leaves a layer as it is."""
    return Variant(KEPT, replace(scheme, format="none"))
