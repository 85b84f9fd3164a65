"""Choices that are really carried out in memory, to be measured: what the bisection asks of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from quantlab.allocation.error import survey
from quantlab.allocation.kl import resumed
from quantlab.allocation.task import Task


class Evaluated:
    """Divergence of a model whose items are quantized as a choice says.

    Each layer is quantized with the inputs that it has in the original model, once for every candidate that is asked
    for; all of them stay in the process's memory, in the model's dtype.

    Args:
        task: the model and the candidates.
        items: layers that agree.
    """

    def __init__(self, task: Task, items: Sequence[Sequence[str]]) -> None:
        self._task, self._items = task, items
        self._divergence = resumed(task)
        self._weights: dict[int, dict[str, torch.Tensor]] = {}
        self.evaluations = 0

    def loss(self, chosen: Sequence[int]) -> float:
        """KL divergence from the original, nats a token."""
        self.evaluations += 1
        self._task.tell(self.evaluations, self.evaluations + 1, f"evaluation {self.evaluations}")
        changes: dict[str, torch.Tensor] = {}
        for members, number in zip(self._items, chosen, strict=True):
            if number not in self._task.kept:
                changes |= {name: self._quantized(number)[name] for name in members}
        return self._divergence.of(changes)

    def _quantized(self, number: int) -> dict[str, torch.Tensor]:
        if number not in self._weights:
            found: dict[str, torch.Tensor] = {}

            def look(_group: tuple[str, ...], shown: dict[int, dict[str, torch.Tensor]]) -> None:
                found.update(
                    {name: weight.to("cpu", self._task.source.dtype) for name, weight in shown[number].items()}
                )

            survey(replace(self._task, plans={number: self._task.plans[number]}), None, look)
            self._weights[number] = found
        return self._weights[number]
