"""What quantlab_evals raises when it is asked for something it cannot measure."""

from __future__ import annotations


class EvalError(Exception):
    """Bad input, in one paragraph: it names what was given, the value and the remedy."""
