"""Which variant to take under common wishes, in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..bootstrap import ClusterMeans, compare
from ..errors import EvalError
from ..measures import Measure, measure_called
from ..pareto import Limit, Record, best, figure, pareto, within

QUALITY = ("kl", "ppl", "output_error", "weight_error")
"""What says how good a variant is: the first of these that was measured."""
_SHARES = (0.01, 0.02, 0.05, 0.1)
_BITS = (8.5, 4.6, 3.6, 2.6)
_SAID = 3
_SPOILT = 2.0
"""Times the original's perplexity from which on a variant is not worth a recommendation."""


@dataclass(frozen=True)
class Verdict:
    """The variant that answers a wish.

    Attributes:
        wish: in words.
        variant: its name.
        why: its figures beside the original's.
        alike: others that keep to the same limits and that this measurement cannot tell from it.
    """

    wish: str
    variant: str
    why: str
    alike: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON mapping."""
        return {**asdict(self), "alike": list(self.alike)}


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """Answers to common wishes; the first is what to take without a wish of one's own. None if nothing was measured."""
    original = next((record for record in records if record.get("kind") == "original"), None)
    variants = [record for record in records if record.get("kind") != "original" and "error" not in record]
    quality = quality_of(variants)
    if quality is None:
        return []
    found: list[Verdict] = []
    for wish, record, rivals in _wishes(variants, original, quality):
        if record is not None:
            found.append(Verdict(wish, record["variant"], _why(record, original), _alike(record, rivals, quality)))
    return _without_repetition(found)


def quality_of(records: Sequence[Record]) -> Measure | None:
    """The measure that says how good variants are; None if none was taken."""
    for name in QUALITY:
        measure = measure_called(name)
        if any(figure(record, measure) is not None for record in records):
            return measure
    return None


def _wishes(
    variants: Sequence[Record], original: Record | None, quality: Measure
) -> Iterator[tuple[str, Record | None, Sequence[Record]]]:
    """A wish, its answer, and the other variants that would have kept to it."""
    near = _smallest_near(variants, original)
    if near is not None:
        yield near
    fast = [record for record in variants if figure(record, measure_called("decode")) is not None]
    if fast and original is not None and figure(original, measure_called("ppl")) is not None:
        limit = within(original, "ppl", 0.05)
        yield "Fastest within 5 % of the original's perplexity", best(fast, "decode", [limit]), ()
    bits = measure_called("bits")
    for bound in _BITS:
        limit = Limit(bits, high=bound)
        kept = [record for record in variants if limit.holds(record)]
        if len(kept) < len(variants) and not _spoilt(best(kept, quality.name), original):
            yield f"Best under {bound:g} bits a weight", best(kept, quality.name), kept
    try:
        front = pareto(variants, ["bits", quality.name])
    except EvalError:
        front = None
    if front is not None and front.knee is not None:
        yield "Where the front bends: more bits buy little, fewer cost much", front.records[front.knee], ()
    yield "Closest to the original", best(variants, quality.name), variants


def _smallest_near(
    variants: Sequence[Record], original: Record | None
) -> tuple[str, Record | None, Sequence[Record]] | None:
    """The smallest within the least share of the original's perplexity that any variant keeps to."""
    if original is None or figure(original, measure_called("ppl")) is None:
        return None
    for share in _SHARES:
        limit = within(original, "ppl", share)
        record = best(variants, "bytes", [limit])
        if record is not None:
            return f"Smallest within {share:.0%} of the original's perplexity".replace("%", " %"), record, ()
    return None


def _spoilt(record: Record | None, original: Record | None) -> bool:
    """Whether there is no such variant, or it says nothing that makes sense any more."""
    if record is None or original is None:
        return record is None
    ppl, before = (figure(whose, measure_called("ppl")) for whose in (record, original))
    return ppl is not None and before is not None and ppl > _SPOILT * before


def _why(record: Record, original: Record | None) -> str:
    """Size and quality in a line."""

    def of(name: str, whose: Record | None = record) -> float | None:
        return None if whose is None else figure(whose, measure_called(name))

    parts = []
    if (bits := of("bits")) is not None:
        parts.append(f"{bits:.2f} bits a weight")
    size, before = of("bytes"), of("bytes", original)
    if size is not None:
        times = f", {before / size:.1f} times smaller" if before is not None and before > size else ""
        parts.append(f"{size:,.0f}\u00a0MB{times}")
    ppl, reference = of("ppl"), of("ppl", original)
    if ppl is not None:
        change = f" ({100 * (ppl / reference - 1):+.1f}\u00a0%)" if reference else ""
        parts.append(f"perplexity {ppl:.2f}{change}")
    if (agreement := of("agreement")) is not None:
        parts.append(f"the original's next token {agreement:.0f}\u00a0% of the time")
    if (error := of("output_error")) is not None:
        parts.append(f"error of the outputs {error:.2g}")
    if (rate := of("decode")) is not None:
        times_faster = of("times_faster")
        faster = f", {times_faster:.2f} times the original's" if times_faster is not None else ""
        parts.append(f"{rate:.0f} tokens/s{faster}")
    return "; ".join(parts)


def _alike(record: Record, rivals: Sequence[Record], quality: Measure) -> tuple[str, ...]:
    """Rivals that the measurement cannot tell from a variant, the smallest first."""
    ours = _clusters(record, quality)
    if ours is None:
        return ()
    found = []
    for rival in rivals:
        theirs = _clusters(rival, quality) if rival["variant"] != record["variant"] else None
        if theirs is not None and (theirs.kind, theirs.tokens) == (ours.kind, ours.tokens):
            comparison = compare(ours, theirs, quality.label)
            if comparison.better is None:
                found.append((figure(rival, measure_called("bytes")) or math.inf, str(rival["variant"])))
    return tuple(name for _, name in sorted(found)[:_SAID])


def _clusters(record: Record, quality: Measure) -> ClusterMeans | None:
    evaluation: Mapping[str, Any] = record.get("evaluation") or {}
    part = (evaluation.get("divergence") or {}).get("kl_clusters") if quality.name == "kl" else None
    if quality.name == "ppl":
        part = (evaluation.get("perplexity") or {}).get("clusters")
    return None if part is None else ClusterMeans(part["kind"], tuple(part["tokens"]), tuple(part["means"]))


def _without_repetition(found: Sequence[Verdict]) -> list[Verdict]:
    """One verdict a variant: of several wishes that it answers, all are named."""
    kept: dict[str, Verdict] = {}
    for verdict in found:
        if (before := kept.get(verdict.variant)) is not None:
            wish = f"{before.wish}; {verdict.wish[0].lower()}{verdict.wish[1:]}"
            kept[verdict.variant] = Verdict(wish, verdict.variant, before.why, before.alike or verdict.alike)
        else:
            kept[verdict.variant] = verdict
    return list(kept.values())
