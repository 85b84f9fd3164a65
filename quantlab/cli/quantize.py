"""`quantlab quantize`: a model by a recipe, into a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from quantlab.cli import verify
from quantlab.cli.options import (
    MODEL,
    CalibrationLength,
    CalibrationSamples,
    CalibrationSeed,
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
    "  quantlab quantize demo --recipe w4-rtn --out demo-w4\n"
    "  quantlab quantize demo --out demo-w3 --set format=int3 --samples 16\n\n"
    "  quantlab quantize demo --out demo-w4 --memory 3GB --dry-run\n\n"
    "Interrupted, the same command goes on where it stopped."
)


def quantize(
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; it must not exist yet.")],
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="A ready recipe (see `quantlab recipes`) or a YAML file.")
    ] = "w4-gptq",
    settings: RecipeSettings = None,
    calibration: CalibrationSource = None,
    samples: CalibrationSamples = None,
    length: CalibrationLength = None,
    seed: CalibrationSeed = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what an interrupted run left.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a result that is there.")] = False,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Take a model that is quantized already: a second loss.")
    ] = False,
    verified: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Load the result in a process of its own and check it.")
    ] = True,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory to stay within, like 2GB: what does not fit waits on the disk."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where blocks are computed, one at a time: cpu, cuda, cuda:1, or auto: a GPU if any.")
    ] = "cpu",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would be done and what it takes, and stop.")
    ] = False,
    threads: Threads = None,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append a line a layer, with the time, to a file.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Quantize a model by a recipe and write the result to a folder."""
    overrides = overrides_with_calibration(settings, calibration, samples, length, seed)
    with Output(as_json, quiet) as output:
        from quantlab.cli import show
        from quantlab.cli.progress import Watch, peak_memory, stderr_console, writers

        follows = os.environ.get("RANK", "0") != "0"  # of several processes one speaks
        quiet, log = quiet or follows, None if follows else log
        if dry_run:
            prepare(threads, quiet=quiet)
            from quantlab.engine.quantize import dry_run as run_dry

            found = run_dry(
                model,
                recipe,
                out,
                overrides=overrides,
                overwrite=overwrite,
                requantize=requantize,
                memory=memory,
                device=device,
            )
            output.answer({"model": model, "folder": out, **found.to_dict()}, *show.estimated(found, model, recipe))
            return
        with Watch(f"{model} → {out}, {recipe}", writers(stderr_console(), quiet=quiet, log=log)) as watch:
            output.on_interrupt = watch.interrupted
            prepare(threads, quiet=quiet)
            from quantlab.engine.quantize import quantize as run

            result = run(
                model,
                recipe,
                out,
                overrides=overrides,
                progress=watch,
                restart=restart,
                overwrite=overwrite,
                requantize=requantize,
                memory=memory,
                device=device,
            )
        if follows:
            return
        peak = peak_memory()
        checked = verify.checked(result.folder) if verified else None
        document = {
            "model": model,
            "folder": result.folder,
            "recipe": result.recipe.to_dict(),
            "bits": result.bits,
            "bytes": result.bytes,
            "original_bytes": result.original_bytes,
            "seconds": result.seconds,
            "peak_memory": peak,
            "resumed_blocks": result.resumed_blocks,
            "calibration": result.calibration,
            "verification": None if checked is None else checked.to_dict(),
            "layers": [{**report.record(), "seconds": report.seconds} for report in result.reports],
        }
        words = show.quantized(result, model=model, peak_memory=peak)
        output.answer(document, *words, *(() if checked is None else verify.summary(checked)))
