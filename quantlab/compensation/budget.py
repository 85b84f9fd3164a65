"""One budget of bits for the corrections of many layers."""

from __future__ import annotations

from collections.abc import Mapping

from quantlab.compensation.base import Outlook


def share_ranks(outlooks: Mapping[str, Outlook], bits: int, overhead: int, budget: float) -> dict[str, int]:
    """The rank of each layer, by gain per bit.

    A layer's ranks cost the same and gain less and less, so to take the dearest rank that still pays first is best, up
    to what the last rank leaves over.

    Args:
        outlooks: by layer.
        bits: of an element of a factor.
        overhead: bits a rank beside its two vectors.
        budget: bits a weight, over all these layers' weights.
    """
    costs = {name: bits * sum(outlook.shape) + overhead for name, outlook in outlooks.items()}
    offers = [(gain / costs[name], name) for name, outlook in outlooks.items() for gain in outlook.gains if gain > 0]
    left = budget * sum(outlook.shape[0] * outlook.shape[1] for outlook in outlooks.values())
    ranks = dict.fromkeys(outlooks, 0)
    for _, name in sorted(offers, key=lambda offer: -offer[0]):  # stable: layers in their order, where they tie
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks
