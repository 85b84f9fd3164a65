"""The commands and their options."""

from __future__ import annotations

import os
import sys
from importlib import metadata, resources
from pathlib import Path
from typing import Annotated, Any

import typer

from quantlab.cli import (
    bench,
    compare,
    evaluate,
    evaluate_benchmarks,
    evaluate_code,
    evaluate_generation,
    export,
    plan,
    roofline,
    sweep,
    verify,
)
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
    chosen_settings,
    overrides_with_calibration,
    prepare,
)
from quantlab.cli.output import BAD_INPUT, INTERRUPTED, Output, say_error

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True, epilog="Example:\n\n  quantlab quantize demo --recipe w4-rtn --out demo-w4")
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print versions and exit.")] = False,
) -> None:
    """Make a Hugging Face model small: quantize it, measure what that cost, look inside the result."""
    if version:
        parts = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers")]
        typer.echo(f"quantlab {metadata.version('quantlab')} ({', '.join(parts)}, Python {sys.version.split()[0]})")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(
    epilog="Examples:\n\n"
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


app.command("eval", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command("eval-code", epilog=evaluate_code.EXAMPLES)(evaluate_code.evaluate_code)
app.command("eval-generation", epilog=evaluate_generation.EXAMPLES)(evaluate_generation.evaluate_generation)
app.command("eval-summaries", epilog=evaluate_benchmarks.SUMMARIES_EXAMPLES)(evaluate_benchmarks.evaluate_summaries)
app.command("eval-tasks", epilog=evaluate_benchmarks.TASKS_EXAMPLES)(evaluate_benchmarks.evaluate_tasks)


@app.command(
    "inspect",
    epilog="Examples:\n\n  quantlab inspect demo-w4 --fold\n  quantlab inspect demo-w4 --set sort=error --set limit=10",
)
def inspect_(
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
        from quantlab.inspection import inspect

        inspection = inspect(folder)
        layers = sorted(inspection.layers, key=keys[sort])[:limit]
        hidden = len(inspection.layers) - len(layers)
        document = inspection.to_dict()
        shown = {layer.layer: record for layer, record in zip(inspection.layers, document["layers"], strict=True)}
        document["layers"] = [shown[layer.layer] for layer in layers]
        output.answer(document, *show.inspected(inspection, layers, fold=bool(chosen["fold"]), hidden=hidden))


app.command(epilog=compare.EXAMPLES)(compare.compare)
app.command(epilog=plan.EXAMPLES)(plan.plan)
app.command(epilog=bench.EXAMPLES)(bench.bench)
app.command(epilog=roofline.EXAMPLES)(roofline.roofline)
app.command(epilog=sweep.SWEEP_EXAMPLES)(sweep.sweep)
app.command(epilog=sweep.PARETO_EXAMPLES)(sweep.pareto)
app.command(epilog=sweep.REPORT_EXAMPLES)(sweep.report)


app.command(epilog=export.EXAMPLES)(export.export)
app.command(epilog=verify.EXAMPLES)(verify.verify)


@app.command("export-adapter", epilog="Example:\n\n  quantlab export-adapter demo-w4-lorc demo-adapter")
def export_adapter(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `quantlab quantize` wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist yet.")],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What the adapter is for: a name or folder for its config.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the low-rank corrections of a quantized model as a PEFT adapter, for the same codes elsewhere."""
    with Output(as_json) as output:
        prepare(None, quiet=True)
        from quantlab.checkpoint.adapter import save_adapter

        save_adapter(folder, out, base)
        output.answer({"folder": folder, "adapter": out}, f"adapter written to {out}")


@app.command(epilog="Examples:\n\n  quantlab recipes\n  quantlab recipes w4-gptq --set format=int3 > my-recipe.yaml")
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


@app.command(epilog="Examples:\n\n  quantlab formats\n  quantlab formats --plot formats.svg")
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


def main(arguments: list[str] | None = None) -> None:
    """The entry point: run a command and exit with its code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in arguments
    try:
        code = app(arguments, prog_name="quantlab", standalone_mode=False) or 0
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        # typer's usage errors have no public base class; this is what they have in common.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "quantlab"
        message = f"{error.format_message().rstrip('.')}; see: {command} --help"
        say_error(message, "UsageError", json=as_json)
        code = BAD_INPUT
    sys.exit(code)
