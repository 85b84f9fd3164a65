"""A plan as a person reads it: its figures, candidates, bits by layer, and why a layer got what it got."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from quantlab.cli.show import clock, number, pairs, repeated, size

if TYPE_CHECKING:
    from quantlab.allocation.plan import Plan, PlannedItem
    from quantlab.plan_check import Curve

_WIDEST, _CURVE = 8, 40


def planned(plan: Plan, file: Path | None) -> Iterator[RenderableType]:
    """A plan: what it is predicted to lose, how the candidates share the weights, bits by layer."""
    yield Text(f"{plan.model} planned for {plan.budget}", style="bold")
    yield figures(plan)
    yield Text("")
    yield _candidates(plan)
    yield Text("")
    yield picture(plan)
    if file is not None:
        yield Text("")
        table, quoted = pairs(), shlex.quote(str(file))
        table.add_row("plan", str(file))
        table.add_row("next", f"quantlab quantize {shlex.quote(plan.model)} --recipe {quoted} --out DIR")
        table.add_row("", f"quantlab inspect {quoted} --layer {plan.items[0].layers[0]}")
        yield table


def figures(plan: Plan) -> Table:
    """Bits, bytes, the predicted loss and what is known of it."""
    table = pairs()
    table.add_row(
        "bits a weight",
        f"{plan.bits:.3f} in {sum(len(item.layers) for item in plan.items)} layers, scales and tables counted; "
        f"codes alone {plan.code_bits:.3f}",
    )
    table.add_row("size", f"{size(plan.bytes)} of these layers, {size(plan.bytes + plan.fixed_bytes)} with all others")
    if plan.cost_unit == "seconds":
        total = 1e3 * (plan.cost + plan.fixed_cost)
        table.add_row("a token", f"{total:.3g} ms predicted, {1e3 * plan.cost:.3g} ms of it in these layers")
    table.add_row("predicted", f"{number(plan.loss)} {plan.unit}")
    if plan.measured is not None:
        ratio = f", {plan.measured / plan.loss:.2f} times the predicted" if plan.predicts and plan.loss > 0 else ""
        table.add_row("measured", f"{number(plan.measured)} KL divergence, nats a token{ratio}")
    elif plan.predicts:
        table.add_row("", "not measured: it assumes that losses of layers add up; `--measure 1` quantizes and says")
    else:
        table.add_row("", "orders layers, and says nothing of the model's loss")
    when = "measured before, taken from the cache" if plan.cached else f"took {clock(plan.seconds)}"
    table.add_row("sensitivity", f"{plan.method}, {when}")
    for label, note in zip(repeated("notes"), plan.notes, strict=False):
        table.add_row(label, note)
    return table


def curve(found: Curve, model: str, file: Path) -> Iterator[RenderableType]:
    """Plans over all budgets, and predicted against measured loss."""
    yield Text(f"{model}: {len(found.plans)} plans", style="bold")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in ("bits", "codes", "size", "predicted", "measured", "ratio"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("predicted loss", no_wrap=True)
    most = max(plan.loss for plan in found.plans) or 1.0
    for plan in found.plans:
        measured, ratio = "", ""
        if plan.measured is not None:
            measured, ratio = number(plan.measured), f"{plan.measured / plan.loss:.2f}" if plan.loss > 0 else ""
        bar = Text("█" * max(0, round(_CURVE * plan.loss / most)), style="cyan")
        cells = (f"{plan.bits:.2f}", f"{plan.code_bits:.2f}", size(plan.bytes), number(plan.loss), measured, ratio)
        table.add_row(*cells, bar)
    yield table
    yield Text("")
    said = pairs()
    said.add_row("loss", found.plans[0].unit)
    if found.ratio is not None:
        off = "" if found.error is None else f"; with that, predictions are off by {found.error:.0%} at most"
        said.add_row("measured", f"{found.ratio:.2f} times the predicted loss{off}")
    else:
        said.add_row("measured", "nothing: the curve is a prediction, and an order")
    said.add_row("curve", str(file))
    yield said


def _candidates(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("candidate", no_wrap=True)
    for header in ("layers", "of the weights", "size", "predicted loss"):
        table.add_column(header, justify="right", no_wrap=True)
    names = dict.fromkeys(option.candidate for item in plan.items for option in item.options)
    for name in names:
        with_it = [item for item in plan.items if item.got.candidate == name]
        if with_it:
            table.add_row(
                name,
                str(sum(len(item.layers) for item in with_it)),
                f"{sum(item.weights for item in with_it) / plan.weights:.1%}",
                size(sum(item.got.bytes for item in with_it)),
                number(sum(item.got.loss for item in with_it)),
            )
    return table


def picture(plan: Plan) -> Table:
    """Bits of each item's codes as bars: a line a block, a column a kind of layer."""
    cells: dict[str, dict[str, PlannedItem]] = {}
    for item in plan.items:
        block, kind = _place(item.layers)
        cells.setdefault(block, {})[kind] = item
    kinds = list(dict.fromkeys(kind for row in cells.values() for kind in row))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("bits of codes", no_wrap=True)
    for kind in kinds:
        table.add_column(kind, no_wrap=True)
    for block, row in cells.items():
        table.add_row(block, *(_bar(row.get(kind)) for kind in kinds))
    return table


def _bar(item: PlannedItem | None) -> Text:
    if item is None:
        return Text("")
    bits = item.got.bits
    return Text.assemble(("█" * min(bits, _WIDEST), "cyan"), " " * (_WIDEST - min(bits, _WIDEST)), f" {bits}")


def _place(layers: tuple[str, ...]) -> tuple[str, str]:
    """A block, and what the layers are called in it: ``q k v``."""
    match = re.match(r"(.*?\.\d+)\.(.*)", layers[0])
    if match is None:
        return "outside", layers[0]
    leaves = dict.fromkeys(name.rpartition(".")[2].removesuffix("_proj") for name in layers)
    return match[1], " ".join(leaves)


def explained(plan: Plan, layer: str, item: PlannedItem, said: list[str]) -> Iterator[RenderableType]:
    """One layer: its options, and why it got the one that it got."""
    yield Text(f"{layer}: {item.got.candidate}", style="bold")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in ("", "candidate"):
        table.add_column(header, no_wrap=True)
    for header in ("predicted loss", "size", *(["a token"] if plan.cost_unit == "seconds" else [])):
        table.add_column(header, justify="right", no_wrap=True)
    for option in sorted(item.options, key=lambda option: (option.cost, -option.loss)):
        mark = "*" if option is item.got else ""
        time = [f"{1e3 * option.cost:.3g} ms"] if plan.cost_unit == "seconds" else []
        table.add_row(
            mark, option.candidate, number(option.loss), size(option.bytes), *time, style="bold" if mark else ""
        )
    yield table
    yield Text("")
    for sentence in said:
        yield Text(sentence)
