"""`quantlab recipes` and `quantlab formats`: what there is to choose from."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from quantlab.cli.options import Json
from quantlab.cli.output import Output

RECIPES_EXAMPLES = "Examples:\n\n  quantlab recipes\n  quantlab recipes w4-gptq --set format=int3 > my-recipe.yaml"
FORMATS_EXAMPLES = "Examples:\n\n  quantlab formats\n  quantlab formats --plot formats.svg"


def recipes(
    name: Annotated[str | None, typer.Argument(help="A ready recipe, or a YAML file, to print.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a field; prints the recipe that results."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the ready recipes with when to use them, or print one."""
    with Output(as_json) as output:
        import yaml

        from quantlab.cli import show
        from quantlab.errors import RecipeError

        # As text: reading them as recipes would import torch, and one is printed with its comments.
        files = sorted(resources.files("quantlab_recipes").iterdir(), key=lambda file: file.name)
        ready = {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in files if f.name.endswith(".yaml")}
        if name is None:
            if settings:
                raise RecipeError("--set changes one recipe; name it: `quantlab recipes w4-gptq --set format=int3`")
            parsed = {key: yaml.safe_load(text) for key, text in ready.items()}
            when = {key: str(entry.get("description", "")).strip() for key, entry in parsed.items()}
            listed = [{"name": key, "description": description} for key, description in when.items()]
            output.answer({"recipes": listed}, *show.recipe_table(when))
        elif name in ready and not settings and not as_json:
            output.answer(None, show.verbatim(ready[name]))
        else:
            from quantlab.recipe import load_recipe

            recipe = load_recipe(name, settings or ()).to_dict()
            text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
            output.answer(recipe, show.verbatim(text))


def formats(
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw every format's values on a number line, as SVG.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List what a code can mean: the number formats, their range, what they cost, and when to use them."""
    with Output(as_json) as output:
        from quantlab.cli import number_lines
        from quantlab.formats import formats as describe

        described = describe()
        if plot is not None:
            plot.parent.mkdir(parents=True, exist_ok=True)
            plot.write_text(number_lines.svg(described), encoding="utf-8")
        output.answer({"formats": [entry.to_dict() for entry in described]}, *number_lines.table(described, plot))
