"""Answers of `quantlab eval` as a person reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from quantlab.cli.show import bos, clock, pairs, repeated, size

if TYPE_CHECKING:
    from quantlab_evals import Calibration, Comparison, Divergence, RecordLoss, RollingPerplexity

    from quantlab.evaluation import Evaluation


def evaluated(evaluation: Evaluation) -> Iterator[RenderableType]:
    """A measurement: the figures, and under them every choice."""
    measured, compared = evaluation.perplexity, evaluation.divergence
    table = _columns("", "value", "95 % interval")
    table.add_row("perplexity", f"{measured.perplexity:.3f}", _interval(measured.interval, ".3f"))
    if compared is not None:
        _divergence_rows(table, compared)
    if evaluation.words is not None:
        _words_rows(table, evaluation.words)
    if evaluation.calibration is not None:
        _calibration_rows(table, evaluation.calibration)
    yield Text(evaluation.model + (f" against {evaluation.against}" if evaluation.against else ""), style="bold")
    yield table
    yield Text("")
    yield _choices(evaluation)


def variants(
    found: Sequence[Evaluation], comparisons: Sequence[tuple[str, str, Comparison]]
) -> Iterator[RenderableType]:
    """Several measurements on the same text, a line each, and which differences are more than chance."""
    table = _columns(
        "model", "size", "perplexity", "x original", "mean KL", "99 % KL", "same top token", "flips", "ECE"
    )
    for evaluation in found:
        compared, calibrated = evaluation.divergence, evaluation.calibration
        table.add_row(
            evaluation.model,
            size(evaluation.bytes),
            f"{evaluation.perplexity.perplexity:.3f}",
            "" if compared is None else f"{compared.difference.perplexity_ratio:.4f}",
            "" if compared is None else f"{compared.kl:.4f}",
            "" if compared is None else f"{compared.kl_p99:.3f}",
            "" if compared is None else f"{compared.agreement:.2%}",
            "" if compared is None else f"{compared.flips:.2%}",
            "" if calibrated is None else f"{calibrated.ece[15]:.4f}",
        )
    against = found[0].against
    yield Text(f"{len(found)} models" + (f" against {against}" if against else ""), style="bold")
    yield table
    yield Text("")
    for line in verdicts(comparisons):
        yield Text(line)
    yield Text("")
    yield _choices(found[0], together=True)


def verdicts(comparisons: Sequence[tuple[str, str, Comparison]]) -> list[str]:
    """A sentence for each comparison of a model with the best one."""
    lines = []
    for best, other, comparison in comparisons:
        verdict = comparison.verdict(other, best)
        lines.append(verdict if comparison.better else f"{other} and {best} are {verdict}")
    return lines


def _divergence_rows(table: Table, compared: Divergence) -> None:
    original, ratio = compared.reference, compared.difference
    table.add_row("  of the original", f"{original.perplexity:.3f}", _interval(original.interval, ".3f"))
    ratio_interval = _interval(ratio.perplexity_ratio_interval, ".4f")
    table.add_row("  ratio, paired", f"{ratio.perplexity_ratio:.4f}", ratio_interval)
    table.add_row("KL divergence, nats", f"{compared.kl:.4f}", _interval(compared.kl_interval, ".4f"))
    table.add_row("  median", f"{compared.kl_median:.4f}", "")
    table.add_row("  99th percentile", f"{compared.kl_p99:.4f}", "")
    table.add_row("  largest", f"{compared.kl_max:.4f}", "")
    table.add_row("same top token", f"{compared.agreement:.2%}", _interval(compared.agreement_interval, ".2%"))
    table.add_row("flips", f"{compared.flips:.2%}", f"{compared.lost:.2%} lost, {compared.gained:.2%} gained")


def _words_rows(table: Table, words: RollingPerplexity) -> None:
    table.add_row("perplexity a word", f"{words.word_perplexity:.3f}", _interval(words.interval, ".3f"))
    table.add_row("  a token", f"{words.token_perplexity:.3f}", "")
    table.add_row("  bits a byte", f"{words.bits_per_byte:.4f}", "")


def _calibration_rows(table: Table, found: Calibration) -> None:
    by_bins = ", ".join(f"{value:.4f} with {bins}" for bins, value in found.ece.items() if bins != 15)
    table.add_row("accuracy", f"{found.accuracy:.2%}", f"confidence {found.confidence:.2%}")
    table.add_row("calibration error (ECE)", f"{found.ece[15]:.4f}", f"15 bins; {by_bins}")
    table.add_row("  bins of equal mass", f"{found.ece_equal_mass[15]:.4f}", "")
    table.add_row("  largest of a bin", f"{found.mce[15]:.4f}", "")
    table.add_row("  without bins (KS)", f"{found.ks_error:.4f}", "")
    table.add_row("  of each class", f"{found.classwise_ece:.2e}", "")
    if found.ece_scaled is not None and found.ece_unscaled is not None:
        before = f"{found.ece_unscaled[15]:.4f} without, temperature {found.temperature:.3f}"
        table.add_row("  second half, rescaled", f"{found.ece_scaled[15]:.4f}", before)
    table.add_row("Brier score", f"{found.brier:.4f}", "")


def _choices(evaluation: Evaluation, *, together: bool = False) -> Table:
    """Everything that the figures depend on; `together`: what several models have in common."""
    measured = evaluation.perplexity
    settings = measured.settings
    choices = pairs()
    choices.add_row("text", f"{evaluation.text} ({evaluation.origin})")
    choices.add_row(
        "windows",
        f"{measured.windows} of {settings['window_length']} tokens, {measured.tokens:,} predicted; "
        f"{bos(settings['bos'])}",
    )
    left = f"{settings['beyond_limit']:,} not asked for, {settings['dropped_tail']:,} too few for a window"
    choices.add_row("tokens", f"{settings['stream_tokens']:,} in the text, {left}")
    choices.add_row("documents", f"{settings['documents']:,}, joined by {settings['joiner']!r}")
    choices.add_row("intervals", str(settings["interval"]))
    for label, note in zip(repeated("notes"), evaluation.notes, strict=False):
        choices.add_row(label, note)
    if evaluation.divergence is not None and (loss := evaluation.divergence.record_loss) is not None:
        choices.add_row("original", f"from a record: {_loss(loss)}")
    if not together:
        weights = size(evaluation.bytes)
        if evaluation.original_bytes is not None:
            weights += f", the original's {size(evaluation.original_bytes)}"
        choices.add_row("weights", weights)
    choices.add_row("run", f"{settings['dtype']} on {settings['device']}, {clock(evaluation.seconds)}")
    return choices


def _loss(loss: RecordLoss) -> str:
    return (
        f"{loss.top_k} tokens a position and {loss.sampled} of the others ({loss.tail_mass:.1%} of the mass); "
        f"mean KL +- {loss.standard_error:.1e}, and {loss.difference:+.1e} +- {loss.difference_error:.1e} off "
        f"at {loss.positions} positions where all is known"
    )


def _columns(*headers: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in headers:
        table.add_column(header, justify="left" if header in ("", "model") else "right")
    return table


def _interval(interval: tuple[float, float] | None, spec: str) -> str:
    return "one window: none" if interval is None else f"{interval[0]:{spec}} to {interval[1]:{spec}}"
