"""Benchmark tasks and summaries, for any model by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quantlab_evals import (
    Sampling,
    Summaries,
    TaskResults,
    check_tasks,
    load_pairs,
    rouge_scorer,
    run_tasks,
    summarize_documents,
)
from transformers import PreTrainedModel

from quantlab.engine.device import MEASURING, computing
from quantlab.evaluation.subject import Device, Subject, placed, tokenizer_of

Model = str | Path | PreTrainedModel


def evaluate_tasks(
    model: Model,
    tasks: Sequence[str | Path],
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 1,
    chat: bool = False,
    seed: int = 0,
    device: Device = None,
    tokenizer: Any = None,
) -> TaskResults:
    """Run lm-eval's tasks, by name or from local files, on a model; see :func:`quantlab_evals.run_tasks`.

    ``device`` is as in :func:`quantlab.evaluate`.

    Raises:
        QuantlabError: there is no such model, tokenizer or device.
        EvalError: lm-eval is not installed, or cannot run a task.
    """
    check_tasks(tasks)
    subject = Subject.of(model, placed(device))
    tokenizer = tokenizer_of([subject]) if tokenizer is None else tokenizer
    with computing(MEASURING):
        return run_tasks(
            subject.loaded(),
            tokenizer,
            tasks,
            limit=limit,
            shots=shots,
            batch_size=batch_size,
            chat=chat,
            seed=seed,
        )


def evaluate_summaries(
    model: Model,
    file: str | Path,
    *,
    document: str = "document",
    summary: str = "summary",
    template: str | None = None,
    sampling: Sampling | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: Device = None,
    tokenizer: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summaries:
    """Let a model summarize the documents of a file of JSON lines, and score it by ROUGE.

    ``document`` and ``summary`` name the fields; ``limit`` keeps the first documents; ``device`` is as in
    :func:`quantlab.evaluate`. The rest is as in :func:`quantlab_evals.summarize_documents`.

    Raises:
        QuantlabError: there is no such model, tokenizer or device.
        EvalError: the file cannot be read, or rouge-score is not installed.
    """
    rouge_scorer()  # which may not be installed: said before a model is loaded
    pairs = load_pairs(file, document=document, summary=summary)[:limit]
    subject = Subject.of(model, placed(device))
    tokenizer = tokenizer_of([subject]) if tokenizer is None else tokenizer
    with computing(MEASURING):
        return summarize_documents(
            subject.loaded(), tokenizer, pairs, template=template, sampling=sampling, seed=seed, progress=progress
        )
