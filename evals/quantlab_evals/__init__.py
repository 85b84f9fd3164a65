"""Model in, numbers out: text, windows of tokens, perplexity and divergence from a reference.

Stands on torch, transformers and datasets, and on nothing else of quantlab.
"""

from .bootstrap import bootstrap_interval
from .divergence import Divergence, divergence
from .errors import EvalError
from .perplexity import WINDOW_LENGTH, NllDifference, Perplexity, paired_difference, perplexity
from .text import BUILTIN, TextSource, load_documents, load_text
from .windows import JOINER, Windows, check_length, token_windows

__all__ = [
    "BUILTIN",
    "JOINER",
    "WINDOW_LENGTH",
    "Divergence",
    "EvalError",
    "NllDifference",
    "Perplexity",
    "TextSource",
    "Windows",
    "bootstrap_interval",
    "check_length",
    "divergence",
    "load_documents",
    "load_text",
    "paired_difference",
    "perplexity",
    "token_windows",
]
