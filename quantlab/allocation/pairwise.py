"""Sensitivity ``pairwise``: another one's losses, and what pairs of items lose beside the sum of both, measured.

Without any second derivative, by CLADO's identity (arXiv:2307.05657):

    O_ij = L(d_i + d_j) - L(d_i) - L(d_j) + L(0)  =  d_i^T H_ij d_j    where L is quadratic

for pairs within a block, between neighbouring blocks too, or among the items that lose most. Measured for one
candidate; the term is linear in the size of either error, and these go with the roots of losses, so that for others

    O_ij(k, l) = O_ij sqrt(L_i(k) / L_i) sqrt(L_j(l) / L_j)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch

from quantlab.allocation import error, kl
from quantlab.allocation.error import survey
from quantlab.allocation.items import agreeing, short_name
from quantlab.allocation.kl import resumed
from quantlab.allocation.sensitivity import Pair, Sensitivity, Unit
from quantlab.allocation.task import Task
from quantlab.errors import PreflightError

BASES: Mapping[str, Callable[[Task], Sensitivity]] = {"error": error.measure, "kl": kl.measure}
PAIRS = ("block", "neighbours", "top")
# Of `top`; and what all items together may lose at the candidate that pairs are measured for.
TOP, MOST = 20, 0.5


def measure(task: Task) -> Sensitivity:
    """Options: ``base`` (error or kl), ``pairs`` (block, neighbours or top), ``top``: how many items.

    Raises:
        PreflightError: an option that cannot be; memory cannot hold the model in float32 and its quantized weights.
    """
    options = {"base": "error", "pairs": PAIRS[0], "top": TOP, **task.options}
    base, which, top = options["base"], options["pairs"], options["top"]
    if base not in BASES:
        raise PreflightError(f"base {base!r}: use one of {', '.join(BASES)}")
    if which not in PAIRS or type(top) is not int or top < 2:
        raise PreflightError(f"pairs {which!r}, top {top!r}: use {', '.join(PAIRS)}, and at least 2")
    task.refuse_too_large(torch.float32)
    found = BASES[str(base)](task)
    together = bool(task.options.get("together", True))
    groups = found.groups if together else tuple((name,) for group in found.groups for name in group)
    items = agreeing(groups, task.architecture, task.tied)
    losses = found.of_items(items)
    number = reference(losses)
    weights: dict[str, torch.Tensor] = {}

    def look(_group: tuple[str, ...], shown: dict[int, dict[str, torch.Tensor]]) -> None:
        weights.update({name: weight.to(task.source.dtype) for name, weight in shown.get(number, {}).items()})

    survey(replace(task, plans={number: task.plans[number]}), None, look)
    divergence = resumed(task)
    pairs = chosen_pairs(items, losses[:, number], task, str(which), top)

    def loss(changed: Iterable[int]) -> float:
        return divergence.of({name: weights[name] for item in changed for name in items[item]})

    terms = pair_terms(
        loss,
        pairs,
        lambda done, i, j: task.tell(done, len(pairs), f"{short_name(items[i])} with {short_name(items[j])}"),
    )
    return replace(
        found,
        method="pairwise",
        units=tuple(Unit(item, tuple(losses[i].tolist())) for i, item in enumerate(items)),
        pairs=tuple(
            Pair(i, j, tuple(map(tuple, scaled(term, losses[i], losses[j], number).tolist())))
            for (i, j), term in terms.items()
        ),
        notes=(*found.notes, f"pairs were measured at {task.candidates[number].name}"),
    )


def pair_terms(
    loss: Callable[[Iterable[int]], float],
    pairs: Sequence[tuple[int, int]],
    tell: Callable[[int, int, int], None] = lambda _done, _i, _j: None,
) -> dict[tuple[int, int], float]:
    """The term of each pair, from the loss of what is changed together; each single loss is taken once.

    Args:
        loss: of a model in which some items are changed.
        pairs: of items.
        tell: told of the pairs done, and of the pair that follows.
    """
    nothing = loss(())
    alone = {item: loss((item,)) for item in sorted({item for pair in pairs for item in pair})}
    terms = {}
    for done, (i, j) in enumerate(pairs):
        tell(done, i, j)
        terms[i, j] = loss((i, j)) - alone[i] - alone[j] + nothing
    return terms


def scaled(term: float, first: np.ndarray, second: np.ndarray, number: int) -> np.ndarray:
    """A term that was measured for one candidate, for all pairs of candidates, ``[candidates, candidates]``."""

    def sizes(losses: np.ndarray) -> np.ndarray:
        if losses[number] <= 0:
            return np.zeros_like(losses)
        return np.where(np.isfinite(losses), np.sqrt(np.maximum(losses, 0) / losses[number]), 0.0)

    return term * np.outer(sizes(first), sizes(second))


def reference(losses: np.ndarray) -> int:
    """The candidate that pairs are measured for: the coarsest that all items can have, up to a limit of loss."""
    sums = losses.sum(0)
    possible = [number for number in np.argsort(-sums) if math.isfinite(sums[number]) and sums[number] > 0]
    if not possible:
        raise PreflightError("pairs: no candidate can be had by all layers")
    return int(next((number for number in possible if sums[number] <= MOST), possible[-1]))


def chosen_pairs(
    items: Sequence[Sequence[str]], losses: np.ndarray, task: Task, which: str, top: int
) -> list[tuple[int, int]]:
    """Pairs ``(i, j)``, ``i < j``."""
    if which == "top":
        return list(combinations(sorted(int(item) for item in np.argsort(-losses)[:top]), 2))
    order = {block: place for place, block in enumerate(task.architecture.blocks)}
    place = [order.get(task.architecture.place_of(item[0])) for item in items]
    reach = 1 if which == "neighbours" else 0
    return [
        (i, j)
        for i, j in combinations(range(len(items)), 2)
        if (a := place[i]) is not None and (b := place[j]) is not None and abs(a - b) <= reach
    ]
