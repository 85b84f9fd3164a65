"""What one evaluation found, for programs and for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from quantlab_evals import Calibration, Divergence, Perplexity, RollingPerplexity


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model, and every choice that was made for it.

    Attributes:
        model: what was measured.
        against: its original, or None.
        text: the name of the text, and ``origin`` where it comes from.
        origin: see ``text``.
        perplexity: of the model, with its interval and the settings of the measurement.
        divergence: from the original, with the original's perplexity; None without one.
        calibration: how well its confidence matches how often it is right; None if not asked for.
        words: perplexity a word, a byte and a token as lm-eval measures them; None if not asked for.
        bytes: of the model's weights.
        original_bytes: of the original's, or None.
        seconds: that measuring took, without loading models or recording the original's predictions.
        notes: choices that the text or the models left no other way.
    """

    model: str
    against: str | None
    text: str
    origin: str
    perplexity: Perplexity
    divergence: Divergence | None
    calibration: Calibration | None
    words: RollingPerplexity | None
    bytes: int
    original_bytes: int | None
    seconds: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able mapping; the settings, which all figures share, stand in it once."""
        flat = asdict(self)
        flat["settings"] = flat["perplexity"].pop("settings")
        if self.divergence is not None:
            parts = flat["divergence"]
            parts["definition"] = parts.pop("settings")["definition"]
            parts["reference"].pop("settings")
            del parts["model"]  # the perplexity above
            difference = self.divergence.difference
            parts["difference"] |= {
                "perplexity_ratio": difference.perplexity_ratio,
                "perplexity_ratio_interval": difference.perplexity_ratio_interval,
            }
        return flat

    def to_markdown(self) -> str:
        """A page with the figures in one table and every choice below it."""
        table = [f"| {name} | {before} | {after} |" for name, before, after in self._rows()]
        choices = [f"* {name}: {value}" for name, value in self.perplexity.settings.items()]
        return "\n".join(
            [
                f"# {self.model}",
                "",
                f"Measured on {self.text} ({self.origin}).",
                "",
                f"| | {self.against or 'original (not measured)'} | {self.model} |",
                "|---|---|---|",
                *table,
                "",
                f"Intervals are 95 % bootstrap intervals over {self.perplexity.clusters.kind}.",
                "",
                *choices,
                *(f"* {note}" for note in self.notes),
                "",
            ]
        )

    def _rows(self) -> list[tuple[str, str, str]]:
        original = self.divergence.reference if self.divergence else None
        rows = [
            ("size of the weights", _megabytes(self.original_bytes), _megabytes(self.bytes)),
            ("perplexity", _with_interval(original), _with_interval(self.perplexity)),
        ]
        if (found := self.divergence) is not None:
            rows += [
                ("perplexity, relative", "1", f"{found.difference.perplexity_ratio:.4f}"),
                ("mean KL divergence", "0", f"{found.kl:.4f}"),
                ("99th percentile KL", "0", f"{found.kl_p99:.3f}"),
                ("top-1 agreement", "100 %", f"{found.agreement:.2%}"),
                ("flips", "0 %", f"{found.flips:.2%}"),
            ]
        if self.words is not None:
            rows.append(("perplexity a word", "", f"{self.words.word_perplexity:.3f}"))
        if self.calibration is not None:
            rows += [
                ("calibration error (ECE, 15 bins)", "", f"{self.calibration.ece[15]:.4f}"),
                ("calibration error, without bins (KS)", "", f"{self.calibration.ks_error:.4f}"),
                ("Brier score", "", f"{self.calibration.brier:.4f}"),
            ]
        return rows


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f} MB"


def _with_interval(found: Perplexity | None) -> str:
    if found is None:
        return ""
    interval = f" ({found.interval[0]:.2f} to {found.interval[1]:.2f})" if found.interval else ""
    return f"{found.perplexity:.3f}{interval}"
