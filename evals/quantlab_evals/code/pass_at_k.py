"""How many problems a model solves: pass@k, by running what it wrote in a sandbox."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..bootstrap import ClusterMeans, Interval
from ..errors import EvalError
from .problems import Problem
from .sandbox import Isolation, Limits, Outcome, check_isolation, run_program

Progress = Callable[[int, int], None]
"""Called with the programs run and the programs in all."""


@dataclass(frozen=True)
class CodeResult:
    """What became of a model's completions.

    Attributes:
        pass_at: pass@k by k: the chance that at least one of k completions solves a problem, mean over problems.
        intervals: 95 % bootstrap intervals over problems, by k; None for a single problem.
        solved: of each problem the share of its completions that solve it.
        outcomes: of each problem, how each of its completions ended.
        isolation: how the programs were locked in, and by what.
    """

    pass_at: Mapping[int, float]
    intervals: Mapping[int, Interval | None]
    solved: Mapping[str, float]
    outcomes: Mapping[str, tuple[Outcome, ...]]
    isolation: str

    def clusters(self, k: int = 1) -> ClusterMeans:
        """pass@k of each problem, for a paired comparison with another model (`compare`)."""
        each = [pass_at_k(len(all_), sum(o.passed for o in all_), k) for all_ in self.outcomes.values()]
        return ClusterMeans("problems", (1,) * len(each), tuple(each))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate of pass@k from `samples` completions: 1 - C(n - c, k) / C(n, k).

    Source: arXiv:2107.03374, equation 1. Raises `EvalError` unless 1 <= k <= samples and 0 <= correct <= samples.
    """
    if not 1 <= k <= samples:
        raise EvalError(f"pass@{k} cannot be estimated from {samples} completions a problem; generate {k} or more")
    if not 0 <= correct <= samples:
        raise EvalError(f"{correct} of {samples} completions cannot be correct")
    wrong = samples - correct
    return float(1 - np.prod([(wrong - i) / (samples - i) for i in range(k)]))


def run_completions(
    problems: Sequence[Problem],
    completions: Mapping[str, Sequence[str]],
    *,
    ks: Sequence[int] = (1,),
    limits: Limits | None = None,
    isolation: Isolation = "strict",
    workers: int = 1,
    progress: Progress | None = None,
) -> CodeResult:
    """Run each completion's program in a sandbox of its own, and count.

    **This executes code that nobody has read.** What holds it is said in `sandbox.py`.

    Args:
        problems: what was to be solved.
        completions: by `task_id`: what follows the prompt.
        ks: for which k.
        limits: what one program may use.
        isolation: `strict` refuses to run where the kernel cannot lock a program in.
        workers: programs at a time.
        progress: told after each program.

    Raises:
        EvalError: a problem has no completions, or too few for k; the sandbox cannot be set up.
    """
    protections = check_isolation(isolation)
    for problem in problems:
        for k in ks:
            pass_at_k(len(completions.get(problem.task_id, ())), 0, k)
    jobs = [(problem, text) for problem in problems for text in completions[problem.task_id]]

    def run(job: tuple[Problem, str]) -> Outcome:
        return run_program(job[0].program(job[1]), limits=limits, isolation=isolation)

    found: dict[str, list[Outcome]] = {problem.task_id: [] for problem in problems}
    pool = ThreadPoolExecutor(workers)
    try:
        for done, ((problem, _), outcome) in enumerate(zip(jobs, pool.map(run, jobs), strict=True), start=1):
            found[problem.task_id].append(outcome)
            if progress is not None:
                progress(done, len(jobs))
    finally:
        pool.shutdown(cancel_futures=True)
    words = f"{isolation}: limits of time and memory{''.join(f', {name}' for name in protections)}"
    outcomes = {name: tuple(ended) for name, ended in found.items()}
    solved = {name: sum(outcome.passed for outcome in ended) / len(ended) for name, ended in outcomes.items()}
    result = CodeResult({}, {}, solved, outcomes, words)
    each = {k: result.clusters(k) for k in ks}
    return CodeResult(
        pass_at={k: clusters.mean for k, clusters in each.items()},
        intervals={k: clusters.interval() for k, clusters in each.items()},
        solved=solved,
        outcomes=outcomes,
        isolation=words,
    )
