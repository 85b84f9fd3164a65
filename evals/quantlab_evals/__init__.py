"""Model in, numbers out: perplexity and divergence on windows of text, speed and memory.

Stands on torch, transformers, datasets and scipy, and on nothing else of quantlab.
"""

from .bootstrap import ClusterMeans, Comparison, bootstrap_interval, compare
from .calibration import Calibration, CalibrationMeasure, calibration, token_calibration
from .decoder import GreedyDecoder
from .definitions import NAMES as DEFINITIONS
from .definitions import default_length, windows_as
from .divergence import Divergence, DivergenceMeasure, compare_divergences, divergence
from .errors import EvalError
from .generation import Sampling, Scored, distinct, generate, repetition, sampling_grid, score
from .layers import layer_timings
from .loading import LoadCost, Memory, load_cost
from .logits import TokenMeasure, describe_model, run_measures, running_on
from .machine import Machine, describe_machine, matrix_flops, stream_bandwidth
from .measures import MEASURES, PREDICTED, Measure, measure_called
from .pareto import Front, Limit, best, figure, hypervolume, knee, non_dominated, pareto, within
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
from .speed import Run, Speed, SpeedComparison, SpeedSettings, measure_speed
from .summaries import Summaries, SummaryPair, load_pairs, rouge_scorer, summarize_documents
from .tasks import Choices, TaskResult, TaskResults, check_tasks, compare_choices, run_tasks
from .text import BUILTIN, TextSource, load_documents, load_text
from .timing import Timing, timed
from .windows import JOINER, Windows, check_length, token_windows

__all__ = [
    "BUILTIN",
    "DEFINITIONS",
    "JOINER",
    "MEASURES",
    "PREDICTED",
    "WINDOW_LENGTH",
    "Calibration",
    "CalibrationMeasure",
    "Choices",
    "ClusterMeans",
    "Comparison",
    "Divergence",
    "DivergenceMeasure",
    "EvalError",
    "Front",
    "GreedyDecoder",
    "Limit",
    "LiveReference",
    "LoadCost",
    "Machine",
    "Measure",
    "Memory",
    "NllDifference",
    "NllMeasure",
    "Perplexity",
    "RecordLoss",
    "RecordedReference",
    "Reference",
    "RollingPerplexity",
    "Run",
    "Sampling",
    "Scored",
    "Speed",
    "SpeedComparison",
    "SpeedSettings",
    "Summaries",
    "SummaryPair",
    "TaskResult",
    "TaskResults",
    "TextSource",
    "Timing",
    "TokenMeasure",
    "Windows",
    "best",
    "bootstrap_interval",
    "calibration",
    "check_length",
    "check_tasks",
    "compare",
    "compare_choices",
    "compare_divergences",
    "compare_perplexities",
    "default_length",
    "describe_machine",
    "describe_model",
    "distinct",
    "divergence",
    "figure",
    "fingerprint_folder",
    "fingerprint_model",
    "generate",
    "hypervolume",
    "knee",
    "layer_timings",
    "load_cost",
    "load_documents",
    "load_pairs",
    "load_text",
    "matrix_flops",
    "measure_called",
    "measure_speed",
    "non_dominated",
    "paired_difference",
    "pareto",
    "perplexity",
    "prefix_token",
    "recorded_reference",
    "repetition",
    "rolling_perplexity",
    "rouge_scorer",
    "run_measures",
    "run_tasks",
    "running_on",
    "sampling_grid",
    "score",
    "stream_bandwidth",
    "summarize_documents",
    "timed",
    "token_calibration",
    "token_windows",
    "windows_as",
    "within",
]
