"""How many programming problems a model solves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab_evals import Sampling, describe_model, generate
from quantlab_evals.code import (
    CodeResult,
    Isolation,
    Limits,
    check_isolation,
    first_answer,
    load_problems,
    run_completions,
)
from transformers import PreTrainedModel

from quantlab.engine.device import MEASURING, computing
from quantlab.errors import DataError
from quantlab.evaluation.subject import Device, Subject, placed, tokenizer_of

Progress = Callable[[int, int], None]
"""Called with the problems or programs done and those in all."""


@dataclass(frozen=True)
class CodeEvaluation:
    """What a model's programs did.

    `completions` are the texts after the prompts, by problem; `settings` what of the model's state can move them.
    """

    model: str
    problems: str
    sampling: Sampling
    samples: int
    seed: int
    result: CodeResult
    completions: dict[str, list[str]]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able mapping."""
        return {
            "model": self.model,
            "problems": self.problems,
            "sampling": vars(self.sampling),
            "samples": self.samples,
            "seed": self.seed,
            "settings": self.settings,
            "pass_at": dict(self.result.pass_at),
            "intervals": dict(self.result.intervals),
            "isolation": self.result.isolation,
            "tasks": {
                name: [
                    {"passed": outcome.passed, "reason": outcome.reason, "completion": text}
                    for outcome, text in zip(outcomes, self.completions[name], strict=True)
                ]
                for name, outcomes in self.result.outcomes.items()
            },
        }


def evaluate_code(
    model: str | Path | PreTrainedModel,
    problems: str | Path,
    *,
    execute: bool = False,
    samples: int = 1,
    ks: Sequence[int] = (1,),
    sampling: Sampling | None = None,
    limit: int | None = None,
    seed: int = 0,
    seconds: float = 10.0,
    isolation: Isolation = "strict",
    workers: int = 1,
    device: Device = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> CodeEvaluation:
    """Let a model complete programs, run them in a sandbox, and count those that pass their tests: pass@k.

    **This executes code that the model wrote and nobody has read**, so ``execute`` has to say so.
    :mod:`quantlab_evals.code.sandbox` says what holds it.

    Args:
        model: a folder, a Hugging Face id, ``bitsandbytes:KIND:MODEL``, a model in memory.
        problems: a file in HumanEval's format, or a data set as ``name:config:split``.
        execute: must be true.
        samples: completions of each problem; more than one needs a temperature.
        ks: for which k; the estimate is unbiased for k below ``samples`` too.
        sampling: how tokens are chosen; None: the likeliest, 512 at most.
        limit: the first problems only.
        seed: completions of a problem depend on it and the problem's name.
        seconds: for each program, wall clock and processor.
        isolation: ``strict`` refuses to run where the kernel cannot lock a program in; ``limits`` bounds time
            and memory with whatever else the kernel offers.
        workers: programs at a time.
        device: where the model runs, as in :func:`quantlab.evaluate`; its programs run on the CPU.
        tokenizer: for a model in memory; otherwise the model's own is loaded.
        progress: told after each problem, then after each program.

    Raises:
        DataError: ``execute`` is not true.
        QuantlabError: there is no such model or device.
        EvalError: there are no problems, too few samples, or no sandbox.
    """
    if execute is not True:
        raise DataError(
            "this runs code that the model writes, unread, on this machine (without network, in a folder of its own, "
            "with limits); say that you want that: --execute-generated-code, or execute=True"
        )
    check_isolation(isolation)
    sampling = sampling or Sampling(max_new_tokens=512)
    loaded_problems = load_problems(problems, limit=limit)
    if max(ks) > samples:
        raise DataError(f"pass@{max(ks)} needs {max(ks)} samples of each problem or more, and there are {samples}")
    subject = Subject.of(model, placed(device))
    tokenizer = tokenizer_of([subject]) if tokenizer is None else tokenizer
    completions: dict[str, list[str]] = {}
    with computing(MEASURING):
        module = subject.loaded()
        for done, problem in enumerate(loaded_problems, start=1):
            prompt = tokenizer(problem.prompt)["input_ids"]
            own_seed = int.from_bytes(hashlib.sha256(f"{seed}:{problem.task_id}".encode()).digest()[:4], "big")
            written = generate(module, prompt, sampling, samples=samples, seed=own_seed)
            completions[problem.task_id] = [first_answer(_text(tokenizer, prompt, tokens)) for tokens in written]
            if progress is not None:
                progress(done, len(loaded_problems))
    result = run_completions(
        loaded_problems,
        completions,
        ks=ks,
        limits=Limits(seconds=seconds, cpu_seconds=max(1, round(seconds))),
        isolation=isolation,
        workers=workers,
        progress=progress,
    )
    about = describe_model(module)
    return CodeEvaluation(subject.name, str(problems), sampling, samples, seed, result, completions, about)


def _text(tokenizer: Any, prompt: list[int], written: list[int]) -> str:
    """What was written as text: decoded behind its prompt, or some tokenizers would drop a leading space."""

    def decoded(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return decoded([*prompt, *written])[len(decoded(prompt)) :]
