"""Model in, numbers out: text, windows of tokens, perplexity and divergence from a reference.

Stands on torch, transformers, datasets and scipy, and on nothing else of quantlab.
"""

from .bootstrap import ClusterMeans, Comparison, bootstrap_interval, compare
from .calibration import Calibration, calibration, token_calibration
from .definitions import NAMES as DEFINITIONS
from .definitions import windows_as
from .divergence import Divergence, compare_divergences, divergence
from .errors import EvalError
from .perplexity import WINDOW_LENGTH, NllDifference, Perplexity, compare_perplexities, paired_difference, perplexity
from .recorded import RecordedReference
from .recording import fingerprint_folder, fingerprint_model, recorded_reference
from .reference import RecordLoss
from .rolling import RollingPerplexity, rolling_perplexity
from .text import BUILTIN, TextSource, load_documents, load_text
from .windows import JOINER, Windows, check_length, token_windows

__all__ = [
    "BUILTIN",
    "DEFINITIONS",
    "JOINER",
    "WINDOW_LENGTH",
    "Calibration",
    "ClusterMeans",
    "Comparison",
    "Divergence",
    "EvalError",
    "NllDifference",
    "Perplexity",
    "RecordLoss",
    "RecordedReference",
    "RollingPerplexity",
    "TextSource",
    "Windows",
    "bootstrap_interval",
    "calibration",
    "check_length",
    "compare",
    "compare_divergences",
    "compare_perplexities",
    "divergence",
    "fingerprint_folder",
    "fingerprint_model",
    "load_documents",
    "load_text",
    "paired_difference",
    "perplexity",
    "recorded_reference",
    "rolling_perplexity",
    "token_calibration",
    "token_windows",
    "windows_as",
]
