"""Budgets as people write them: bits a weight, bytes, time of a token, or how much may be lost."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from quantlab.errors import RecipeError

_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_EXAMPLES = (
    "use 3.5 or 3.5bits (a weight, everything stored counted), 3.5code-bits (codes alone), 90MB or 2GiB (the whole "
    "model), 20ms (a decoded token, with a device), loss=0.05 (nats a token), ppl=2% (more perplexity), or "
    "like=RECIPE (what that recipe loses)"
)


@dataclass(frozen=True)
class Budget:
    """What a plan must keep to.

    Attributes:
        kind: ``bits`` or ``code-bits`` a weight, ``bytes`` of the whole model, ``seconds`` of a decoded token; ``loss``
            in nats a token, or ``like``, what a recipe loses.
        limit: in that unit; not used by ``like``.
        recipe: of ``like``.
    """

    kind: str
    limit: float
    recipe: str = ""

    @property
    def of_loss(self) -> bool:
        """Whether the loss is limited, and size or time is to be small; else the other way round."""
        return self.kind in ("loss", "like")

    def __str__(self) -> str:
        if self.kind == "like":
            return f"like={self.recipe}"
        if self.kind == "loss":
            return f"loss={self.limit:.4g}"
        if self.kind == "bytes":
            return f"{self.limit / 1e6:.10g}MB"
        return f"{1e3 * self.limit:.6g}ms" if self.kind == "seconds" else f"{self.limit:.10g}{self.kind}"


def parse_budget(text: str | float | Budget) -> Budget:
    """A budget from text, or a number of bits a weight.

    Raises:
        RecipeError: says what is allowed.
    """
    if isinstance(text, Budget):
        return text
    written = str(text).strip()
    if match := re.fullmatch(r"like=(\S+)", written):
        return Budget("like", math.nan, match[1])
    if match := re.fullmatch(r"(loss|ppl)=([\d.eE+-]+)(%?)", written):
        name, value, percent = match[1], _number(written, match[2]), bool(match[3])
        if (name == "ppl") != percent:
            raise RecipeError(f"budget {written!r}: {_EXAMPLES}")
        return Budget("loss", math.log1p(value / 100) if percent else value)
    if match := re.fullmatch(r"([\d.eE+-]+)\s*([a-zA-Z-]*)", written):
        value, unit = _number(written, match[1]), match[2].lower()
        if unit in ("", "bits", "bit"):
            return Budget("bits", value)
        if unit in ("code-bits", "code-bit"):
            return Budget("code-bits", value)
        if unit in _BYTES:
            return Budget("bytes", value * _BYTES[unit])
        if unit in _SECONDS:
            return Budget("seconds", value * _SECONDS[unit])
    raise RecipeError(f"budget {written!r}: {_EXAMPLES}")


def _number(written: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise RecipeError(f"budget {written!r}: {_EXAMPLES}")
    return value
