"""The commands `quantlab eval-tasks` and `quantlab eval-summaries`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantlab.cli.options import MEASURED, Device, Json, Quiet, Threads, prepare
from quantlab.cli.output import Output

if TYPE_CHECKING:
    from quantlab_evals import Summaries, TaskResults
    from rich.console import RenderableType

TASKS_EXAMPLES = (
    "Examples:\n\n"
    "  quantlab eval-tasks demo-w4 --task arc_easy --task hellaswag --limit 200\n"
    "  quantlab eval-tasks demo-w4 --task my-task.yaml\n\n"
    "Tasks are run by lm-eval: pip install 'quantlab[eval]'; `lm-eval ls tasks` lists them."
)
SUMMARIES_EXAMPLES = (
    "Example:\n\n"
    "  quantlab eval-summaries demo-w4 --file news.jsonl --document article --summary highlights\n\n"
    "ROUGE is computed by rouge-score: pip install 'quantlab[eval]'."
)
_INTERRUPTED = "interrupted; nothing was written"


def evaluate_tasks(
    model: Annotated[str, typer.Argument(help=MEASURED)],
    tasks: Annotated[
        list[str],
        typer.Option(
            "--task",
            metavar="NAME",
            help="A task, group or tag of lm-eval, or a YAML file. Can be given several times.",
        ),
    ],
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="The first N questions of each only.")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Examples before each question. \\[default: the task's]")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N")] = 1,
    chat: Annotated[bool, typer.Option("--chat", help="Use the tokenizer's chat template.")] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="For the choice of examples.")] = 0,
    device: Device = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run benchmark tasks through lm-eval, with calibration where there are choices."""
    with Output(as_json, quiet, on_interrupt=lambda: _INTERRUPTED) as output:
        prepare(threads, quiet=quiet)
        from dataclasses import asdict

        from quantlab.evaluation import evaluate_tasks as run

        found = run(model, tasks, limit=limit, shots=shots, batch_size=batch_size, chat=chat, seed=seed, device=device)
        output.answer({"model": model, **asdict(found)}, *_task_words(model, found))


def evaluate_summaries(
    model: Annotated[str, typer.Argument(help=MEASURED)],
    file: Annotated[Path, typer.Option(help="Documents with summaries, as JSON lines.")],
    document: Annotated[str, typer.Option(metavar="FIELD")] = "document",
    summary: Annotated[str, typer.Option(metavar="FIELD")] = "summary",
    template: Annotated[
        str | None, typer.Option(help="What the model reads, with {document} in it. \\[default: by the kind of model]")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N")] = 128,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="The first N documents only.")] = None,
    seed: Annotated[int, typer.Option(metavar="N")] = 0,
    device: Device = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Let a causal or encoder-decoder model summarize documents, and score what it writes by ROUGE."""
    with Output(as_json, quiet, on_interrupt=lambda: _INTERRUPTED) as output:
        from quantlab.cli.counting import count_progress
        from quantlab.cli.progress import stderr_console

        with count_progress(stderr_console(), "document", model, quiet=quiet) as progress:
            prepare(threads, quiet=quiet)
            from dataclasses import asdict

            from quantlab_evals import Sampling

            from quantlab.evaluation import evaluate_summaries as run

            found = run(
                model,
                file,
                document=document,
                summary=summary,
                template=template,
                sampling=Sampling(temperature, max_new_tokens=max_new_tokens),
                limit=limit,
                seed=seed,
                device=device,
                progress=progress,
            )
        output.answer({"model": model, "file": file, **asdict(found)}, *_summary_words(model, found))


def _task_words(model: str, found: TaskResults) -> Iterator[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in ("task", "measure", "value", "standard error", "questions", "ECE"):
        table.add_column(header, justify="left" if header in ("task", "measure") else "right")
    for name, task in found.tasks.items():
        ece = "" if task.choices is None else f"{task.choices.calibration.ece[15]:.4f}"
        metrics = {key: value for key, value in task.metrics.items() if not key.split(".")[0].endswith("_stderr")}
        for key, value in metrics.items():
            metric, dot, kept = key.partition(".")
            error = task.metrics.get(f"{metric}_stderr{dot}{kept}")
            questions = f"{task.samples} of {task.available}"
            table.add_row(name, key, f"{value:.4f}", "" if error is None else f"{error:.4f}", questions, ece)
    yield Text(model, style="bold")
    yield table
    settings = found.settings
    yield Text(f"by {settings['tool']}, {settings['dtype']} on {settings['device']}", style="dim")


def _summary_words(model: str, found: Summaries) -> Iterator[RenderableType]:
    from rich.text import Text

    from quantlab.cli.show import pairs

    yield Text(model, style="bold")
    table = pairs()
    for kind, value in found.rouge.items():
        interval = found.intervals[kind]
        spread = "" if interval is None else f" ({interval[0]:.4f} to {interval[1]:.4f})"
        table.add_row(kind, f"{value:.4f}{spread}")
    table.add_row("documents", f"{len(found.texts)}, {found.shortened} of them cut to fit")
    table.add_row("asked", repr(found.settings["template"]))
    table.add_row("run", f"{found.settings['dtype']} on {found.settings['device']}")
    yield table
