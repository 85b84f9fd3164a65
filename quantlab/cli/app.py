"""The table of commands, and the entry point."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Annotated

import typer

from quantlab.cli import (
    bench,
    compare,
    evaluate,
    evaluate_benchmarks,
    evaluate_code,
    evaluate_generation,
    export,
    inspect,
    listings,
    plan,
    quantize,
    roofline,
    sweep,
    verify,
)
from quantlab.cli.output import BAD_INPUT, INTERRUPTED, say_error

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


app.command(epilog=quantize.EXAMPLES)(quantize.quantize)
app.command("eval", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command("eval-code", epilog=evaluate_code.EXAMPLES)(evaluate_code.evaluate_code)
app.command("eval-generation", epilog=evaluate_generation.EXAMPLES)(evaluate_generation.evaluate_generation)
app.command("eval-summaries", epilog=evaluate_benchmarks.SUMMARIES_EXAMPLES)(evaluate_benchmarks.evaluate_summaries)
app.command("eval-tasks", epilog=evaluate_benchmarks.TASKS_EXAMPLES)(evaluate_benchmarks.evaluate_tasks)
app.command(epilog=inspect.EXAMPLES)(inspect.inspect)
app.command(epilog=compare.EXAMPLES)(compare.compare)
app.command(epilog=plan.EXAMPLES)(plan.plan)
app.command(epilog=bench.EXAMPLES)(bench.bench)
app.command(epilog=roofline.EXAMPLES)(roofline.roofline)
app.command(epilog=sweep.SWEEP_EXAMPLES)(sweep.sweep)
app.command(epilog=sweep.PARETO_EXAMPLES)(sweep.pareto)
app.command(epilog=sweep.REPORT_EXAMPLES)(sweep.report)
app.command(epilog=export.EXAMPLES)(export.export)
app.command(epilog=verify.EXAMPLES)(verify.verify)
app.command("export-adapter", epilog=export.ADAPTER_EXAMPLES)(export.export_adapter)
app.command(epilog=listings.RECIPES_EXAMPLES)(listings.recipes)
app.command(epilog=listings.FORMATS_EXAMPLES)(listings.formats)


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
