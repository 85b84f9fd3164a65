"""Which layers get the same scheme: those that one fused kernel would run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from quantlab.engine.architecture import Architecture


def agreeing(
    groups: Iterable[Sequence[str]], architecture: Architecture, tied: Iterable[Sequence[str]] = ()
) -> tuple[tuple[str, ...], ...]:
    """Items of layers that must agree, in the order in which they are met.

    Args:
        groups: layers that share an input (q/k/v, gate/up), in the order in which the model runs.
        architecture: the model's parts; the experts of a block agree, first layers and second layers each among
            themselves.
        tied: layers that share a weight, which agree as well.
    """
    key_of = {name: members[0] for members in tied for name in members}
    items: dict[str, list[str]] = {}
    for group in groups:
        for name in group:
            key = re.sub(r"\.\d+(?=\.[^.]+$)", ".*", name) if name in architecture.routed else group[0]
            items.setdefault(key_of.get(name, key), []).append(name)
    return tuple(tuple(members) for members in items.values())


def patterns(items: Sequence[Sequence[str]], names: Sequence[str]) -> Mapping[str, int]:
    """Lines of a recipe: the number of the item that each pattern stands for, layer by layer.

    Experts become one line, ``model.layers.3.mlp.experts.*.down_proj``, where that names them all and nothing else.
    """
    lines: dict[str, int] = {}
    for number, members in enumerate(items):
        folded = {re.sub(r"\.\d+(?=\.[^.]+$)", ".*", name) for name in members}
        pattern = next(iter(folded))
        if len(members) > 1 and len(folded) == 1:
            named = re.compile(re.escape(pattern).replace(r"\*", ".*"))
            if sum(bool(named.fullmatch(name)) for name in names) == len(members):
                lines[pattern] = number
                continue
        lines |= dict.fromkeys(members, number)
    return lines


def short_name(members: Sequence[str]) -> str:
    """An item in a few words: ``model.layers.3.self_attn.(q|k|v)_proj`` is ``model.layers.3.self_attn.q_proj + 2``."""
    return members[0] if len(members) == 1 else f"{members[0]} + {len(members) - 1}"
