"""The command `quantlab eval`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantlab.cli.options import MEASURED, Device, Json, Quiet, Threads, chosen_settings, prepare
from quantlab.cli.output import Output

if TYPE_CHECKING:
    from quantlab_evals import Comparison

    from quantlab.evaluation import Evaluation

EXAMPLES = (
    "Examples:\n\n"
    "  quantlab eval demo-w4 --against demo --windows 4 --length 512\n"
    "  quantlab eval demo-w4 demo --against demo --cache originals --windows 8 --length 256\n"
    "  quantlab eval demo-w4 --measures calibration --set windows=2 --set length=256\n"
    "  quantlab eval demo-w4 --definition llama.cpp --windows 2"
)
_KEYS = ("text", "windows", "length", "bos", "batch_size")


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=MEASURED + " Several are compared.")],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original, to measure KL divergence and agreement.")
    ] = None,
    text: Annotated[
        str,
        typer.Option(help="A text or .jsonl file, `builtin:eval`, or a data set as name:config:split:column."),
    ] = "builtin:eval",
    windows: Annotated[int | None, typer.Option(metavar="N", help="How many windows. \\[default: all]")] = None,
    length: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens in a window. \\[default: 2048, or as many as there are]"),
    ] = None,
    measures: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Of perplexity, divergence, calibration, words. \\[default: the first, and the second with --against]",
        ),
    ] = None,
    definition: Annotated[
        str, typer.Option(metavar="NAME", help="Whose perplexity: quantlab, gptq or llama.cpp.")
    ] = "quantlab",
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the original's predictions there, and do not run it a second time."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="text, windows, length, bos (auto, true, false) or batch_size."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the figures to a Markdown file.")
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity and, against the original, KL divergence and agreement on the next token."""
    with Output(as_json, quiet, on_interrupt=lambda: "interrupted; nothing was written") as output:
        from quantlab.cli import show_evaluation
        from quantlab.cli.counting import count_progress
        from quantlab.cli.progress import stderr_console

        chosen: dict[str, Any] = {"text": text, "windows": windows, "length": length}
        chosen |= chosen_settings(settings, _KEYS)
        chosen["measures"] = None if measures is None else [name.strip() for name in measures.split(",")]
        with count_progress(stderr_console(), "window", ", ".join(models), quiet=quiet) as progress:
            prepare(threads, quiet=quiet)
            found = list(
                _run(
                    models,
                    against=against,
                    definition=definition,
                    cache=cache,
                    device=device,
                    progress=progress,
                    **chosen,
                )
            )
        comparisons = _compared_with_the_best(found)
        if report is not None:
            report.parent.mkdir(parents=True, exist_ok=True)
            pages = [evaluation.to_markdown() for evaluation in found]
            report.write_text("\n".join([*pages, *show_evaluation.verdicts(comparisons)]), encoding="utf-8")
        if len(found) == 1:
            output.answer(found[0].to_dict(), *show_evaluation.evaluated(found[0]))
            return
        document = {
            "evaluations": [evaluation.to_dict() for evaluation in found],
            "comparisons": [
                {"best": best, "other": other, **vars(comparison)} for best, other, comparison in comparisons
            ],
        }
        output.answer(document, *show_evaluation.variants(found, comparisons))


def _run(models: list[str], **chosen: Any) -> Iterator[Evaluation]:
    from quantlab.evaluation import evaluate as one
    from quantlab.evaluation import evaluate_variants as several

    if len(models) == 1:
        yield one(models[0], **chosen)
    else:
        yield from several(models, **chosen)


def _compared_with_the_best(found: list[Evaluation]) -> list[tuple[str, str, Comparison]]:
    """The best of several, by divergence where it was measured, and each other one against it."""
    if len(found) < 2:
        return []
    from quantlab_evals import compare_divergences, compare_perplexities

    best, *others = sorted(found, key=lambda one: one.divergence.kl if one.divergence else one.perplexity.nll)
    compared = []
    for other in others:
        if best.divergence is not None and other.divergence is not None:
            pairs = compare_divergences(other.divergence, best.divergence)
        else:
            pairs = (compare_perplexities(other.perplexity, best.perplexity),)
        compared += [(best.model, other.model, comparison) for comparison in pairs]
    return compared
