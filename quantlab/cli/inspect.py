"""`quantlab inspect`: what is in a quantized folder, or in a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantlab.cli import plan
from quantlab.cli.options import Json, chosen_settings, prepare
from quantlab.cli.output import Output

EXAMPLES = "Examples:\n\n  quantlab inspect demo-w4 --fold\n  quantlab inspect demo-w4 --set sort=error --set limit=10"


def inspect(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that `quantlab quantize` wrote, or a plan's file.")
    ],
    layer: Annotated[str | None, typer.Option(metavar="NAME", help="Why a plan gave a layer what it got.")] = None,
    fold: Annotated[
        bool, typer.Option("--fold", help="One line for all layers of a kind: model.layers.*.mlp.down_proj.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="sort (order, name, error, bits or bytes), limit, or fold."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a quantized model layer by layer: format, bits a weight with everything counted, error, size; or a plan."""
    with Output(as_json) as output:
        from quantlab.cli import show
        from quantlab.errors import QuantlabError

        if folder.suffix in (".yaml", ".yml") and not folder.is_dir():
            plan.explain(output, folder, layer)
            return
        if layer is not None:  # the recipe of a model that was quantized by a plan holds that plan
            plan.explain(output, folder / "recipe.yaml", layer)
            return

        chosen: dict[str, Any] = {"sort": "order", "limit": None, "fold": fold}
        chosen |= chosen_settings(settings, tuple(chosen))
        sort, limit = chosen["sort"], chosen["limit"]
        # What is largest comes first; only names go up.
        keys: dict[str, Any] = {
            "order": lambda _layer: 0,
            "name": lambda layer: layer.layer,
            "error": lambda layer: -(layer.error or 0.0),
            "bits": lambda layer: -layer.bits,
            "bytes": lambda layer: -layer.bytes,
        }
        if sort not in keys:
            raise QuantlabError(f"sort {sort!r}: use one of {', '.join(keys)}")
        if limit is not None and (type(limit) is not int or limit < 1):
            raise QuantlabError(f"limit {limit!r}: use a whole number, at least 1")
        prepare(None, quiet=True)
        from quantlab.inspection import inspect as run

        inspection = run(folder)
        layers = sorted(inspection.layers, key=keys[sort])[:limit]
        hidden = len(inspection.layers) - len(layers)
        document = inspection.to_dict()
        shown = {layer.layer: record for layer, record in zip(inspection.layers, document["layers"], strict=True)}
        document["layers"] = [shown[layer.layer] for layer in layers]
        output.answer(document, *show.inspected(inspection, layers, fold=bool(chosen["fold"]), hidden=hidden))
