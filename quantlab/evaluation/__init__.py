"""How good a model is, how far from the model that it was made from, and what it can do."""

from quantlab.evaluation.quality import MEASURES, evaluate, evaluate_variants
from quantlab.evaluation.record import Evaluation

__all__ = ["MEASURES", "Evaluation", "evaluate", "evaluate_variants"]
