"""Why a layer got what it got: what its other options would save or cost, and what the budget buys elsewhere."""

from __future__ import annotations

import math

from quantlab.allocation.plan import Plan, PlannedItem, gain


def explain(plan: Plan, layer: str) -> tuple[PlannedItem, list[str]]:
    """The item of a layer, and sentences about it.

    Raises:
        RecipeError: the plan has no such layer.
    """
    item = plan.item_of(layer)
    said = []
    if len(item.layers) > 1:
        said.append(f"It shares its scheme with {', '.join(name for name in item.layers if name != layer)}.")
    said += [*_better(plan, item), *_cheaper(plan, item)]
    share = item.got.loss / plan.loss if plan.loss > 0 else 0.0
    said.append(
        f"It is predicted to lose {item.got.loss:.3g}, {share:.1%} of the plan's, with "
        f"{item.weights / plan.weights:.1%} of its weights."
    )
    return item, said


def _better(plan: Plan, item: PlannedItem) -> list[str]:
    """What the best option that costs more would save."""
    rates = {option: rate for option in item.options if (rate := gain(item.got, option)) is not None}
    if not rates:
        return ["No candidate would lose less here."]
    best = max(rates, key=rates.__getitem__)
    said = [
        f"{best.candidate} would save {item.got.loss - best.loss:.3g} of the loss and cost "
        f"{_cost(plan, best.cost - item.got.cost)} more: {_rate(plan, rates[best])}."
    ]
    if rates[best] < plan.price * (1 - 1e-9):
        first = max(plan.items, key=lambda other: max(gain(other.got, option) or 0 for option in other.options))
        said.append(f"The same cost saves more elsewhere: up to {_rate(plan, plan.price)}, in {first.layers[0]}.")
    else:
        said.append("It would be the next to get more, and what the budget leaves is not enough.")
    return said


def _cheaper(plan: Plan, item: PlannedItem) -> list[str]:
    """What the best option that costs less would lose."""
    got = item.got
    rates = {
        option: (option.loss - got.loss) / (got.cost - option.cost)
        for option in item.options
        if option.cost < got.cost and math.isfinite(option.loss)
    }
    if not rates:
        return []
    least = min(rates, key=rates.__getitem__)
    more = ", more than that would save anywhere else" if rates[least] >= plan.price else ""
    return [
        f"{least.candidate} would free {_cost(plan, got.cost - least.cost)} and lose {least.loss - got.loss:.3g} more: "
        f"{_rate(plan, rates[least])}{more}."
    ]


def _rate(plan: Plan, loss_per_cost: float) -> str:
    if plan.cost_unit == "seconds":
        return f"{1e-3 * loss_per_cost:.3g} a millisecond"
    return f"{1e6 * loss_per_cost:.3g} a megabyte"


def _cost(plan: Plan, cost: float) -> str:
    return f"{1e3 * cost:.3g} ms" if plan.cost_unit == "seconds" else f"{cost / 1e3:.4g} kB"
