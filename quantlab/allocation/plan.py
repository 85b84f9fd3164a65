"""A plan: which candidate each item got, what that is predicted to lose, and why; written as a recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from quantlab.allocation.items import patterns
from quantlab.allocation.sensitivity import NATS
from quantlab.errors import RecipeError
from quantlab.recipe import Recipe, Scheme, load_recipe

_HEADER = "# A plan, written by `quantlab plan`: a recipe with one line a layer. Change what you like.\n"


@dataclass(frozen=True)
class Option:
    """What an item would cost and lose under a candidate.

    Attributes:
        candidate: its name.
        loss: predicted, in the plan's unit.
        cost: in the budget's unit: bytes, or seconds.
        bytes: stored.
        bits: of a code; 16 or so where the layer stays as it is.
    """

    candidate: str
    loss: float
    cost: float
    bytes: int
    bits: int


@dataclass(frozen=True)
class PlannedItem:
    """Layers that share a scheme.

    Attributes:
        layers: their names.
        weights: how many, together.
        chosen: the option that they got.
        options: all that they could have.
    """

    layers: tuple[str, ...]
    weights: int
    chosen: int
    options: tuple[Option, ...]

    @property
    def got(self) -> Option:
        """The option that it got."""
        return self.options[self.chosen]


@dataclass(frozen=True)
class Plan:
    """A choice for every item.

    Attributes:
        model: what was planned for.
        budget: as text.
        cost_unit: what costs are: ``bytes``, ``bytes of codes`` or ``seconds``.
        method: the sensitivity.
        unit: what losses are.
        items: in the order in which the model runs.
        schemes: of the candidates, by name.
        base: the recipe that everything else is taken from.
        fixed_bytes: of what no plan touches: embeddings, norms, layers that stay.
        solver: which.
        fixed_cost: seconds of a token that no plan touches, where costs are seconds.
        pair_loss: what pairs of items lose beside their own losses.
        measured: KL divergence that was really measured, nats a token; None if nobody did.
        notes: what a person should know.
        seconds: that the sensitivity took, when it was measured.
        cached: whether the sensitivity was there already.
    """

    model: str
    budget: str
    cost_unit: str
    method: str
    unit: str
    items: tuple[PlannedItem, ...]
    schemes: Mapping[str, Scheme]
    base: Recipe
    fixed_bytes: int
    solver: str
    fixed_cost: float = 0.0
    pair_loss: float = 0.0
    measured: float | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    cached: bool = False

    @property
    def predicts(self) -> bool:
        """Whether losses are nats a token, not only an order."""
        return self.unit == NATS

    @property
    def loss(self) -> float:
        """Predicted, of all items together."""
        return sum(item.got.loss for item in self.items) + self.pair_loss

    @property
    def cost(self) -> float:
        """Of all items together, in the budget's unit."""
        return sum(item.got.cost for item in self.items)

    @property
    def weights(self) -> int:
        """That take part."""
        return sum(item.weights for item in self.items)

    @property
    def bytes(self) -> int:
        """Of the layers that take part."""
        return sum(item.got.bytes for item in self.items)

    @property
    def bits(self) -> float:
        """Bits a weight, everything stored counted."""
        return 8 * self.bytes / self.weights

    @property
    def code_bits(self) -> float:
        """Bits a weight of codes alone."""
        return sum(item.got.bits * item.weights for item in self.items) / self.weights

    @cached_property
    def price(self) -> float:
        """What the next unit of cost would buy: the most loss that any one change saves a unit of cost."""
        gains = [gain(item.got, option) for item in self.items for option in item.options]
        return max((gain for gain in gains if gain is not None), default=0.0)

    def item_of(self, layer: str) -> PlannedItem:
        """The item that a layer is in.

        Raises:
            RecipeError: it is in none.
        """
        for item in self.items:
            if layer in item.layers:
                return item
        near = [name for item in self.items for name in item.layers if layer in name]
        hint = f"; layers with that in their name: {', '.join(near[:4])}" if near else ""
        raise RecipeError(f"{layer}: the plan has no such layer{hint}")

    def recipe(self) -> Recipe:
        """The recipe that carries it out, with the plan's own figures beside it."""
        names = [name for item in self.items for name in item.layers]
        lines = patterns([item.layers for item in self.items], names)
        changes = {
            pattern: _difference(self.schemes[self.items[number].got.candidate], self.base.default)
            for pattern, number in lines.items()
        }
        described = (
            f"Planned for {self.budget}: {self.bits:.2f} bits a weight, predicted loss {self.loss:.4g} ({self.unit})."
        )
        return replace(
            self.base,
            name=f"plan-{self.budget}",
            description=described,
            layers={**self.base.layers, **changes},
            plan=self.figures(),
        )

    def figures(self) -> dict[str, Any]:
        """What is written beside the recipe: enough to explain it later."""
        flat = {
            key: getattr(self, key) for key in ("model", "budget", "cost_unit", "method", "unit", "solver", "measured")
        }
        sums = {key: getattr(self, key) for key in ("loss", "pair_loss", "cost", "bytes", "bits", "code_bits")}
        items = [
            {
                "layers": list(item.layers),
                "weights": item.weights,
                "chosen": item.got.candidate,
                "options": {
                    option.candidate: {
                        "loss": _plain(option.loss),
                        "cost": option.cost,
                        "bytes": option.bytes,
                        "bits": option.bits,
                    }
                    for option in item.options
                },
            }
            for item in self.items
        ]
        return {
            **flat,
            **sums,
            "fixed_bytes": self.fixed_bytes,
            "fixed_cost": self.fixed_cost,
            "notes": list(self.notes),
            "seconds": self.seconds,
            "items": items,
        }

    def to_dict(self) -> dict[str, Any]:
        """A JSON mapping: the figures, bits by layer, and the recipe."""
        recipe = {key: value for key, value in self.recipe().to_dict().items() if key != "plan"}
        by_layer = {name: item.got.bits for item in self.items for name in item.layers}
        return {**self.figures(), "cached": self.cached, "bits_by_layer": by_layer, "recipe": recipe}

    def write(self, file: Path) -> None:
        """As YAML that ``quantlab quantize --recipe`` reads."""
        text = yaml.safe_dump(
            self.recipe().to_dict(), sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=None
        )
        beside = file.with_name(file.name + ".partial")
        beside.write_text(_HEADER + text, encoding="utf-8")
        beside.replace(file)


def read_plan(file: str | Path) -> Plan:
    """A plan from its file; what a person changed in its lines is not seen here, only what was planned.

    Raises:
        RecipeError: no plan.
    """
    recipe = load_recipe(file)
    if not recipe.plan:
        raise RecipeError(f"{file}: a recipe that no allocator wrote; `quantlab plan` writes plans")
    try:
        return _from_figures(recipe)
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(f"{file}: its plan cannot be read ({error}); write it again with `quantlab plan`") from error


def _from_figures(recipe: Recipe) -> Plan:
    figures = recipe.plan
    items = []
    for entry in figures["items"]:
        names = list(entry["options"])
        options = tuple(
            Option(
                name,
                math.inf if option["loss"] is None else option["loss"],
                option["cost"],
                option["bytes"],
                option["bits"],
            )
            for name, option in entry["options"].items()
        )
        items.append(PlannedItem(tuple(entry["layers"]), entry["weights"], names.index(entry["chosen"]), options))
    flat = {key: figures[key] for key in ("model", "budget", "cost_unit", "method", "unit", "solver", "measured")}
    return Plan(
        **flat,
        items=tuple(items),
        schemes={},
        base=recipe,
        fixed_bytes=figures["fixed_bytes"],
        fixed_cost=figures["fixed_cost"],
        pair_loss=figures["pair_loss"],
        notes=tuple(figures["notes"]),
        seconds=figures["seconds"],
    )


def gain(now: Option, other: Option) -> float | None:
    """The loss that a change saves a unit of cost; None if it costs no more, or saves nothing."""
    if other.cost <= now.cost or not other.loss < now.loss:
        return None
    return (now.loss - other.loss) / (other.cost - now.cost)


def _difference(scheme: Scheme, default: Scheme) -> dict[str, Any]:
    """The fields of a scheme that are not the default's; at least its format."""
    ours, theirs = asdict(scheme), asdict(default)
    return {f.name: ours[f.name] for f in fields(Scheme) if f.name == "format" or ours[f.name] != theirs[f.name]}


def _plain(loss: float) -> float | None:
    return float(f"{loss:.8g}") if math.isfinite(loss) else None
