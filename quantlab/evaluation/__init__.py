"""How good a model is, how far from the model that it was made from, and what it can do."""

from quantlab.evaluation.benchmarks import evaluate_summaries, evaluate_tasks
from quantlab.evaluation.code import CodeEvaluation, evaluate_code
from quantlab.evaluation.generation import generation_sweep
from quantlab.evaluation.quality import MEASURES, evaluate, evaluate_variants
from quantlab.evaluation.record import Evaluation

__all__ = [
    "MEASURES",
    "CodeEvaluation",
    "Evaluation",
    "evaluate",
    "evaluate_code",
    "evaluate_summaries",
    "evaluate_tasks",
    "evaluate_variants",
    "generation_sweep",
]
