"""Model in, numbers out: perplexity and divergence on windows of text, speed and memory.

Stands on torch, transformers and datasets, and on nothing else of quantlab.
"""

from .bootstrap import bootstrap_interval
from .decoder import GreedyDecoder
from .divergence import Divergence, divergence
from .errors import EvalError
from .layers import layer_timings
from .loading import LoadCost, Memory, load_cost
from .machine import Machine, describe_machine, matrix_flops, stream_bandwidth
from .perplexity import WINDOW_LENGTH, NllDifference, Perplexity, paired_difference, perplexity
from .speed import Run, Speed, SpeedComparison, SpeedSettings, measure_speed
from .text import BUILTIN, TextSource, load_documents, load_text
from .timing import Timing, timed
from .windows import JOINER, Windows, check_length, token_windows

__all__ = [
    "BUILTIN",
    "JOINER",
    "WINDOW_LENGTH",
    "Divergence",
    "EvalError",
    "GreedyDecoder",
    "LoadCost",
    "Machine",
    "Memory",
    "NllDifference",
    "Perplexity",
    "Run",
    "Speed",
    "SpeedComparison",
    "SpeedSettings",
    "TextSource",
    "Timing",
    "Windows",
    "bootstrap_interval",
    "check_length",
    "describe_machine",
    "divergence",
    "layer_timings",
    "load_cost",
    "load_documents",
    "load_text",
    "matrix_flops",
    "measure_speed",
    "paired_difference",
    "perplexity",
    "stream_bandwidth",
    "timed",
    "token_windows",
]
