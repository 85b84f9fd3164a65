"""What every sensitivity is given: the model, the layers, the candidates, some text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import psutil
import torch
from transformers import PreTrainedModel

from quantlab.checkpoint.source import ModelSource, parameter_bytes
from quantlab.engine.architecture import OUTSIDE, Architecture, features
from quantlab.engine.footprint import planned_storage, stored_bytes
from quantlab.engine.solve import PlannedLayer
from quantlab.engine.survey import plan_each
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
        source: where weights come from.
        skeleton: the model on the meta device.
        architecture: its parts.
        names: the layers that take part.
        candidates: ways to quantize; one of format ``none`` leaves a layer as it is.
        plans: by candidate's number, what it does with each layer; without those that cannot be carried out, and
            without the one that does nothing.
        tokens: calibration token ids, int64 ``[samples, length]``.
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

    @property
    def kept(self) -> list[int]:
        """Numbers of the candidates that leave a layer as it is."""
        return [number for number, candidate in enumerate(self.candidates) if candidate.scheme.keeps]

    @cached_property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """Layers that take part and share a weight."""
        by_weight: dict[int, list[str]] = {}
        for name in self.names:
            by_weight.setdefault(id(self.skeleton.get_submodule(name).weight), []).append(name)
        return tuple(tuple(names) for names in by_weight.values() if len(names) > 1)

    def costs(self) -> dict[str, np.ndarray]:
        """Bytes of each layer under each candidate, everything stored counted; infinite where it cannot be had."""
        found = {name: np.full(len(self.candidates), math.inf) for name in self.names}
        for name in self.names:
            weight = self.skeleton.get_submodule(name).weight
            found[name][self.kept] = weight.numel() * weight.element_size()
            for number, plan in self.plans.items():
                found[name][number] = stored_bytes(planned_storage(plan[name]))
        return found

    def weights(self) -> dict[str, int]:
        """How many weights each layer has."""
        return {name: self.skeleton.get_submodule(name).weight.numel() for name in self.names}

    def model(self, dtype: torch.dtype | None = None, *, twice: bool = False) -> PreTrainedModel:
        """The whole model in memory, as it is.

        Args:
            dtype: None: its own.
            twice: whether as much again will be needed beside it.

        Raises:
            PreflightError: memory cannot hold it.
        """
        size = parameter_bytes(self.skeleton) * (2 if twice else 1)
        if dtype is not None:
            size = size * dtype.itemsize // self.source.dtype.itemsize
        available = psutil.virtual_memory().available
        if size > available:
            raise PreflightError(
                f"this sensitivity holds the whole model in memory, about {size / _GIB:.1f} GiB, and "
                f"{available / _GIB:.1f} GiB are free; use sensitivity error with coefficients none, which holds one "
                "block, or close other programs"
            )
        model = self.source.skeleton()
        self.source.load(model)
        return model if dtype is None else model.to(dtype)


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


def restricted(plan: Mapping[str, PlannedLayer], names: Sequence[str]) -> dict[str, PlannedLayer]:
    """The part of a plan that is about some layers."""
    return {name: plan[name] for name in names}


def shape_of(task: Task, name: str) -> tuple[int, int]:
    """``(out_features, in_features)`` of a layer."""
    return features(task.skeleton.get_submodule(name))


def as_variant(scheme: Scheme) -> Variant:
    """The candidate that leaves a layer as it is."""
    return Variant(KEPT, replace(scheme, format="none"))


__all__ = ["KEPT", "OUTSIDE", "Task", "Tell", "as_variant", "plan_candidates", "restricted", "shape_of"]
