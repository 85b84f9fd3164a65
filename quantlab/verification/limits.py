"""How far apart two ways of running the same weights may be: as far as rounding takes this model, and no further.

Rounding moves a log-probability by about the size of a rounding error times a number that differs from model to model,
the *sensitivity*, which is measured (see :meth:`quantlab.verification.digest.Digest.of`): 50 for SmolLM2-135M, where
sums in another order then differ by 10 roundings of float32, and all of it in bfloat16 by 4 of bfloat16.
"""

from __future__ import annotations

ROUNDED_INPUTS = 1e-1
"""Mean divergence, nats a position, where inputs are rounded to 8 bits: sums that differ in their last digit put some
of them on the other side of a step, and later layers have more of that: two ways are as far apart as rounding is from
not rounding."""

# Of a log-probability itself, which is a difference of numbers of some tens.
_LAST_DIGITS = 2e-5
# By what a model is computed in: many roundings of float32 (2^-24), since wide layers have long sums and processors
# their own order of them; some of the others (2^-9, 2^-12), which drown everything anyway.
_COMPUTED = {"float32": 2.0**-17, "float16": 2.0**-9, "bfloat16": 2.0**-6}
# By what weights are rounded to before, if that is not known better: a few roundings.
_DECODED = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# Where the sensitivity is not known: 20 times that of SmolLM2-135M.
_UNKNOWN = 1000.0


def largest_difference(sensitivity: float | None, computed: str, decoded: str) -> float | None:
    """What a log-probability may differ by, in nats; None if nobody can say.

    Args:
        sensitivity: of the model; None if it was not measured.
        computed: the dtype that one of the two ways computes in; the other is float32.
        decoded: the dtype that its weights are rounded to when they are decoded, and those of the other are not.
    """
    if computed not in _COMPUTED or decoded not in _DECODED:
        return None
    if sensitivity is None and (computed, decoded) != ("float32", "float32"):
        return None
    known = _UNKNOWN if sensitivity is None else sensitivity
    return _LAST_DIGITS + known * (_COMPUTED[computed] + _DECODED[decoded])
