"""Benchmark tasks, run by lm-eval (an optional extra), with what it found in a record of ours."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .bootstrap import ClusterMeans, Comparison, compare
from .calibration import Calibration, calibration
from .errors import EvalError
from .logits import describe_model, evaluating

_YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Choices:
    """A multiple-choice task, question by question: which choice was the likeliest, and which is right.

    `calibration` takes the choices' likelihoods, made to sum to one, for the model's confidence.
    """

    chosen: tuple[int, ...]
    truth: tuple[int, ...]
    calibration: Calibration

    @property
    def right(self) -> ClusterMeans:
        """1 for each question that is answered rightly, 0 for each other."""
        marks = tuple(float(chosen == truth) for chosen, truth in zip(self.chosen, self.truth, strict=True))
        return ClusterMeans("questions", (1,) * len(marks), marks)


@dataclass(frozen=True)
class TaskResult:
    """One task.

    Attributes:
        task: its name.
        metrics: its figures by lm-eval's names (`acc`, `acc_norm`, `word_perplexity`), and their standard errors
            as `acc_stderr`.
        samples: questions or documents that were measured, of `available`.
        available: see `samples`.
        shots: examples before each question.
        version: of the task.
        choices: where it is a multiple-choice task, what was chosen.
    """

    task: str
    metrics: Mapping[str, float]
    samples: int
    available: int
    shots: int
    version: str
    choices: Choices | None


@dataclass(frozen=True)
class TaskResults:
    """What `run_tasks` found, by task, and every choice that was made."""

    tasks: Mapping[str, TaskResult]
    settings: Mapping[str, Any]


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str | Path],
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 1,
    chat: bool = False,
    seed: int = 0,
) -> TaskResults:
    """Run tasks of lm-eval on a model of transformers.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        tasks: names of lm-eval's tasks, groups or tags, or paths of task files (YAML). A file is trusted: it can
            name Python functions, and those are called.
        limit: the first questions of each only; None: all.
        shots: examples before each question; None: as the task says.
        batch_size: questions at a time.
        chat: whether prompts go through the tokenizer's chat template.
        seed: for the choice of examples.

    Raises:
        EvalError: lm-eval is not installed, there is no such task, or a task's data cannot be had.
    """
    check_tasks(tasks)
    evaluator, hflm, manager = _library()
    if limit is not None and limit < 1:
        raise EvalError(f"limit is {limit}, a number of questions; use 1 or more, or None for all")
    names = [str(task) for task in tasks]
    files = [name for name in names if name.endswith(_YAML)]
    with evaluating(model), _quiet():
        try:
            known = manager(include_defaults=len(files) < len(names))
            answer = evaluator.simple_evaluate(
                model=hflm(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=names,
                num_fewshot=shots,
                limit=limit,
                task_manager=known,
                apply_chat_template=chat,
                bootstrap_iters=1000,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        # lm-eval and the data sets' clients raise dozens of kinds.
        except Exception as error:
            reason = " ".join(str(error).split())[:400]
            raise EvalError(
                f"lm-eval could not run {', '.join(names)} ({type(error).__name__}: {reason}); `lm-eval ls tasks` "
                "lists its tasks, and most of them load their data from the Hugging Face hub"
            ) from error
    settings = {
        "tool": f"lm-eval {metadata.version('lm_eval')}",
        "limit": limit,
        "batch_size": batch_size,
        "chat": chat,
        "seed": seed,
        **describe_model(model),
    }
    return TaskResults({name: _result(name, answer) for name in answer["samples"]}, settings)


def check_tasks(tasks: Sequence[str | Path]) -> None:
    """Raise `EvalError` for what can be known of tasks before a model is loaded: files, and lm-eval itself."""
    for task in tasks:
        if str(task).endswith(_YAML) and not Path(task).is_file():
            raise EvalError(f"{task}: no such task file")
    _library()


def compare_choices(first: TaskResult, second: TaskResult, *, seed: int = 0) -> tuple[Comparison, float]:
    """Compare two models on a multiple-choice task: their accuracies, and the share of questions that flip.

    A flip is a question that one of them answers rightly and the other does not (arXiv:2407.09141). Raises
    `EvalError` if it is no multiple-choice task, or the questions differ.
    """
    if first.choices is None or second.choices is None:
        raise EvalError(f"{first.task} is not a multiple-choice task for both models; compare their metrics instead")
    if first.choices.truth != second.choices.truth:
        raise EvalError(f"{first.task}: the two models were asked different questions; ask both the same ones")
    sides = (first.choices.right, second.choices.right)
    flips = sum(a != b for a, b in zip(sides[0].means, sides[1].means, strict=True)) / len(sides[0].means)
    return compare(*sides, f"accuracy on {first.task}", higher_is_better=True, seed=seed), flips


def _library() -> tuple[Any, Any, Any]:
    try:
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvalError(
            f"tasks are run by lm-eval, which is not installed here ({error}): pip install 'quantlab[eval]'"
        ) from error
    return evaluator, HFLM, TaskManager


@contextmanager
def _quiet() -> Any:
    """lm-eval says much of what it does; problems are still said."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _result(name: str, answer: Mapping[str, Any]) -> TaskResult:
    metrics = {}
    for key, value in answer["results"][name].items():
        metric, comma, kept = key.partition(",")
        if comma and isinstance(value, int | float):
            metrics[metric if kept == "none" else f"{metric}.{kept}"] = float(value)
    counts = answer["n-samples"][name]
    samples = answer["samples"][name]
    return TaskResult(
        task=name,
        metrics=metrics,
        samples=int(counts["effective"]),
        available=int(counts["original"]),
        shots=int(answer["n-shot"].get(name, 0)),
        version=str(answer["versions"].get(name, "")),
        choices=_choices(samples) if answer["configs"][name].get("output_type") == "multiple_choice" else None,
    )


def _choices(samples: Sequence[Mapping[str, Any]]) -> Choices | None:
    """Likelihoods and truths of all questions, by question; None where a question has no single right choice."""
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    truths = [sample["target"] for sample in ordered]
    try:
        truth = torch.tensor([int(json.loads(str(target))) for target in truths])
    except (ValueError, TypeError):
        return None
    rows = [torch.tensor([response[0] for response in sample["filtered_resps"]]) for sample in ordered]
    widest = max(map(len, rows))
    log_p = torch.full((len(rows), widest), -torch.inf, dtype=torch.float64)
    for row, values in zip(log_p, rows, strict=True):
        row[: len(values)] = values
    p = log_p.softmax(-1)
    if not ((truth >= 0) & (truth < widest)).all():
        return None
    return Choices(tuple(log_p.argmax(-1).tolist()), tuple(truth.tolist()), calibration(p, truth))
