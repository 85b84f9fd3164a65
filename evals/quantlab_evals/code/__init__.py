"""Programs that a model writes: problems, running them in a sandbox, pass@k."""

from .pass_at_k import CodeResult, pass_at_k, run_completions
from .problems import STOPS, Problem, first_answer, load_problems
from .sandbox import Isolation, Limits, Outcome, check_isolation, protections, run_program

__all__ = [
    "STOPS",
    "CodeResult",
    "Isolation",
    "Limits",
    "Outcome",
    "Problem",
    "check_isolation",
    "first_answer",
    "load_problems",
    "pass_at_k",
    "protections",
    "run_completions",
    "run_program",
]
