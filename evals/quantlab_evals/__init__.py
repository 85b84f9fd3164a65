"""Model in, numbers out: text, windows of tokens, perplexity and divergence from a reference.

Stands on torch, transformers, datasets and scipy, and on nothing else of quantlab.
"""

from .bootstrap import ClusterMeans, Comparison, bootstrap_interval, compare
from .calibration import Calibration, CalibrationMeasure, calibration, token_calibration
from .definitions import NAMES as DEFINITIONS
from .definitions import default_length, windows_as
from .divergence import Divergence, DivergenceMeasure, compare_divergences, divergence
from .errors import EvalError
from .generation import Sampling, Scored, distinct, generate, repetition, sampling_grid, score
from .logits import TokenMeasure, describe_model, run_measures
from .perplexity import (
    WINDOW_LENGTH,
    NllDifference,
    NllMeasure,
    Perplexity,
    compare_perplexities,
    paired_difference,
    perplexity,
)
from .recorded import RecordedReference
from .recording import fingerprint_folder, fingerprint_model, recorded_reference
from .reference import LiveReference, RecordLoss, Reference
from .rolling import RollingPerplexity, prefix_token, rolling_perplexity
from .summaries import Summaries, SummaryPair, load_pairs, rouge_scorer, summarize_documents
from .tasks import Choices, TaskResult, TaskResults, check_tasks, compare_choices, run_tasks
from .text import BUILTIN, TextSource, load_documents, load_text
from .windows import JOINER, Windows, check_length, token_windows

__all__ = [
    "BUILTIN",
    "DEFINITIONS",
    "JOINER",
    "WINDOW_LENGTH",
    "Calibration",
    "CalibrationMeasure",
    "Choices",
    "ClusterMeans",
    "Comparison",
    "Divergence",
    "DivergenceMeasure",
    "EvalError",
    "LiveReference",
    "NllDifference",
    "NllMeasure",
    "Perplexity",
    "RecordLoss",
    "RecordedReference",
    "Reference",
    "RollingPerplexity",
    "Sampling",
    "Scored",
    "Summaries",
    "SummaryPair",
    "TaskResult",
    "TaskResults",
    "TextSource",
    "TokenMeasure",
    "Windows",
    "bootstrap_interval",
    "calibration",
    "check_length",
    "check_tasks",
    "compare",
    "compare_choices",
    "compare_divergences",
    "compare_perplexities",
    "default_length",
    "describe_model",
    "distinct",
    "divergence",
    "fingerprint_folder",
    "fingerprint_model",
    "generate",
    "load_documents",
    "load_pairs",
    "load_text",
    "paired_difference",
    "perplexity",
    "prefix_token",
    "recorded_reference",
    "repetition",
    "rolling_perplexity",
    "rouge_scorer",
    "run_measures",
    "run_tasks",
    "sampling_grid",
    "score",
    "summarize_documents",
    "token_calibration",
    "token_windows",
    "windows_as",
]
