"""The command `quantlab eval-generation`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantlab.cli.options import MEASURED, Device, Json, Quiet, Threads, numbers, prepare
from quantlab.cli.output import Output

if TYPE_CHECKING:
    from rich.console import RenderableType

EXAMPLES = (
    "Example:\n\n"
    "  quantlab eval-generation demo demo-w4 --against demo --out written --temperature 0,0.8 --prompts 2\n\n"
    "bitsandbytes takes part as bitsandbytes:nf4:demo; its kinds are nf4, nf4-dq, fp4, fp4-dq, int8. "
    "Stopped, the same command goes on where it was."
)


def evaluate_generation(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=MEASURED)],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for the records; an old one is continued.")],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original, to score what the others wrote.")
    ] = None,
    temperature: Annotated[str, typer.Option(metavar="LIST", help="0: the likeliest token.")] = "0,0.7,1",
    top_k: Annotated[str, typer.Option(metavar="LIST", help="0: all tokens.")] = "0",
    top_p: Annotated[str, typer.Option(metavar="LIST")] = "1",
    max_new_tokens: Annotated[str, typer.Option(metavar="LIST")] = "64",
    text: Annotated[
        str, typer.Option(help="Where prompts are cut from, as `quantlab eval` takes it.")
    ] = "builtin:eval",
    prompts: Annotated[int, typer.Option(min=1, metavar="N", help="How many prompts.")] = 8,
    prompt_length: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens of each.")] = 32,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the first prompt; the next has the next.")] = 0,
    device: Device = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Let models write under a grid of settings: speed, memory, repetition, and how the original sees the text."""
    kept = f"interrupted; finished cells are kept in {out}: run the same command again to go on"
    with Output(as_json, quiet, on_interrupt=lambda: kept) as output:
        from quantlab.cli.counting import count_progress
        from quantlab.cli.progress import stderr_console

        axes = [
            numbers(values, name)
            for name, values in (
                ("--temperature", temperature),
                ("--top-k", top_k),
                ("--top-p", top_p),
                ("--max-new-tokens", max_new_tokens),
            )
        ]
        with count_progress(stderr_console(), "cell", ", ".join(models), quiet=quiet) as progress:
            prepare(threads, quiet=quiet)
            from quantlab_evals import sampling_grid

            from quantlab.evaluation import generation_sweep

            grid = sampling_grid(axes[0], [int(k) for k in axes[1]], axes[2], [int(n) for n in axes[3]])
            cells = generation_sweep(
                models,
                grid,
                out,
                against=against,
                text=text,
                prompts=prompts,
                prompt_length=prompt_length,
                seed=seed,
                device=device,
                progress=progress,
            )
        output.answer({"cells": cells, "folder": out}, *_words(cells))


def _words(cells: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    from quantlab.cli.show import size

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    headers = ("model", "temperature", "top-k", "top-p", "tokens", "tokens/s", "memory", "repeated", "distinct-2")
    for header in (*headers, "perplexity", "of original", "agreement"):
        table.add_column(header, justify="left" if header == "model" else "right")
    for cell in cells:
        setting = (cell["model"], f"{cell['temperature']:g}", str(cell["top_k"]), f"{cell['top_p']:g}")
        if "error" in cell:
            table.add_row(*setting, "failed")
            continue
        agreement = cell.get("original_agreement")
        table.add_row(
            *setting,
            str(cell["tokens"]),
            f"{cell['tokens_per_second']:.1f}",
            "" if cell["peak_memory"] is None else size(cell["peak_memory"]),
            f"{cell['repetition_4']:.1%}",
            f"{cell['distinct_2']:.3f}",
            _figure(cell["perplexity"]),
            _figure(cell.get("original_perplexity")),
            "" if agreement is None else f"{agreement:.1%}",
        )
    yield table
    devices = dict.fromkeys(str(cell["device"]) for cell in cells if "device" in cell)
    yield Text(f"on {', '.join(devices)}" if devices else "", style="dim")
    for cell in cells:
        if "error" in cell:
            yield Text(f"{cell['model']} failed: {cell['error']}")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
