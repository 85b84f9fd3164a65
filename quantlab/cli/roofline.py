"""The command `quantlab roofline`."""

from __future__ import annotations

from typing import Annotated

import typer

from quantlab.cli.options import MODEL, Json, Threads, prepare
from quantlab.cli.output import Output

EXAMPLES = (
    "Examples:\n\n"
    "  quantlab roofline demo --recipe w4-gptq --device h100,a100,rtx4090,cpu\n"
    '  quantlab roofline some/model -r w3-gptq --device "mine(tflops=50,bandwidth=450,memory=16)" --tokens 32768'
)


def roofline(
    model: Annotated[str, typer.Argument(help=MODEL + " Its config.json is enough.")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="A ready recipe or a YAML file. [default: the original alone]")
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Devices, with commas; figures can be changed: a100(memory=40,bandwidth=1555). cpu is measured here.",
        ),
    ] = "h100,a100,rtx4090,cpu",
    tokens: Annotated[int, typer.Option(metavar="N", help="Of the context.")] = 4096,
    kv_bits: Annotated[
        float | None, typer.Option(metavar="BITS", help="Of a number in the KV cache. [default: the model's dtype]")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the recipe. Can be given several times."),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Predict speed, memory and concurrency on devices that are not here, from the config and a recipe."""
    with Output(as_json) as output:
        from quantlab.cli import show_roofline

        prepare(threads, quiet=True)
        from quantlab.devices import split_devices
        from quantlab.errors import QuantlabError
        from quantlab.prediction import roofline as run

        if settings and recipe is None:
            raise QuantlabError("--set changes a recipe; name it: --recipe w4-gptq")
        found = run(model, recipe, split_devices(device), tokens=tokens, kv_bits=kv_bits, overrides=settings or ())
        output.answer(found.to_dict(), *show_roofline.predicted(found))
