"""The command `quantlab compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantlab.cli.options import (
    MODEL,
    CalibrationLength,
    CalibrationSamples,
    CalibrationSource,
    Json,
    Quiet,
    RecipeSettings,
    Threads,
    overrides_with_calibration,
    prepare,
)
from quantlab.cli.output import Output

EXAMPLES = (
    "Examples:\n\n"
    '  quantlab compare demo --grid "formats=int4,nf4 quantizers=rtn,gptq" --samples 8\n'
    '  quantlab compare demo --grid "groups=32,64 search=absmax,mse" --layers "*.down_proj"\n\n'
    "Axes: formats, groups, quantizers, compensation, scales, search, symmetric. Options of a method stand in "
    "parentheses: quantizers=rtn,gptq(order=natural,damping=0.05)."
)


def compare(
    model: Annotated[str, typer.Argument(help=MODEL)],
    grid: Annotated[
        str, typer.Option(help='What to combine, as "AXIS=VALUE,... AXIS=VALUE,...", or a YAML file of axes and lists.')
    ],
    layers: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Layers to look at, as in recipes. Can be given several times."),
    ] = None,
    blocks: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Look at N blocks, spread evenly. [default: 4]")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Look at all linear layers of all blocks.")] = False,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Where axes that the grid does not name have their values.")
    ] = "w4-rtn",
    settings: RecipeSettings = None,
    calibration: CalibrationSource = None,
    samples: CalibrationSamples = None,
    length: CalibrationLength = None,
    outputs: Annotated[
        bool, typer.Option("--outputs", help="Measure outputs even where no method needs calibration.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="Where layers are tried: cpu, cuda, cuda:1, or auto: a GPU if any.")
    ] = "cpu",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Also draw error against bits, one point a combination.")
    ] = None,
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare formats, methods and scales on some layers: error and bits of every combination, in one pass."""
    overrides = overrides_with_calibration(settings, calibration, samples, length)
    with Output(as_json, quiet, on_interrupt=lambda: "interrupted; nothing was written") as output:
        from quantlab.cli import show_comparison
        from quantlab.cli.progress import Watch, stderr_console, writers
        from quantlab.errors import QuantlabError

        if sum([bool(layers), blocks is not None, everything]) > 1:
            raise QuantlabError("--layers, --blocks and --all each choose the layers; give one of them")
        if plot is not None:
            show_comparison.check_plot(plot)
        with Watch(f"{model}, compared", writers(stderr_console(), quiet=quiet, log=None)) as watch:
            prepare(threads, quiet=quiet)
            from quantlab.comparison import BLOCKS
            from quantlab.comparison import compare as run

            comparison = run(
                model,
                grid,
                recipe=recipe,
                overrides=overrides,
                layers=layers or None,
                blocks=None if everything else blocks or BLOCKS,
                outputs=outputs,
                device=device,
                progress=watch,
            )
        if plot is not None:
            plot.write_text(show_comparison.plotted(comparison), encoding="utf-8")
        output.answer(comparison.to_dict(), *show_comparison.compared(comparison, plot=plot))
