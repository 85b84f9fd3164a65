"""A sweep as a person sees it: while it works, when it is done, and its front."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.status import Status
from rich.table import Table
from rich.text import Text

from quantlab.cli.show import clock, pairs, repeated

if TYPE_CHECKING:
    from quantlab_evals import Front, Measure

    from quantlab.sweep import Sweep

Answers = Sequence[tuple[str, Mapping[str, Any] | None]]
# What the table of a finished sweep shows, where it was measured.
_COLUMNS = ("bits", "bytes", "ppl", "kl", "agreement", "ece", "decode", "times_faster")


class Shown:
    """A line for every variant that ends; on a terminal also what is being done."""

    def __init__(self, console: Console, model: str, status: Status | None) -> None:
        self._console, self._model, self._status = console, model, status
        self._began = time.perf_counter()
        self._known = self._done = self._total = 0

    def begin(self, names: Sequence[str], known: int) -> None:
        """Everything is checked."""
        self._known = self._done = known
        self._total = len(names)
        before = f", {known} of them measured before" if known else ""
        self._say(f"{self._model}: {len(names)} variants{before}")

    def working(self, name: str, doing: str) -> None:
        """A variant is at work."""
        if self._status is not None:
            self._status.update(Text(f"{self._done + 1} of {self._total}: {name}: {doing}", style="dim"))

    def ended(self, record: Mapping[str, Any]) -> None:
        """A variant has its record."""
        self._done += 1
        elapsed = time.perf_counter() - self._began
        left = elapsed / max(1, self._done - self._known) * (self._total - self._done)
        ahead = f", about {clock(left)} left" if self._done < self._total else ""
        times = f"{clock(record.get('seconds', 0.0))}; {clock(elapsed)} elapsed{ahead}"
        self._say(f"{self._done} of {self._total} {record['variant']}: {_found(record)}, {times}")

    def _say(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


@contextmanager
def watched(console: Console, model: str, *, quiet: bool) -> Iterator[Any]:
    """Whoever is told how a sweep goes."""
    if quiet:
        yield None
    elif not console.is_terminal or console.is_dumb_terminal:
        yield Shown(console, model, None)
    else:
        with console.status("") as status:
            yield Shown(console, model, status)


def _found(record: Mapping[str, Any]) -> str:
    if "error" in record:
        return f"failed: {record['error']}"
    measures = record["measures"]
    names = [name for name in ("bits", "ppl", "kl") if measures.get(name) is not None]
    return ", ".join(f"{name} {value(measures[name])}" for name in names)


def value(number: float | None) -> str:
    """A figure with four digits: ``4.251``, ``18.27``, ``0.0312``, ``1.2e-05``."""
    if number is None:
        return ""
    size = abs(number)
    if size != 0 and not 0.001 <= size < 1e6:
        return f"{number:.1e}"
    return f"{number:.{next((digits for digits, least in enumerate((1000, 100, 10, 1)) if size >= least), 4)}f}"


def swept(found: Sweep, page: Path | None) -> Iterator[RenderableType]:
    """The variants that were measured, those that failed, and what to do next."""
    from quantlab_evals import measure_called

    columns = [name for name in _COLUMNS if any(r["measures"].get(name) is not None for r in found.measured)]
    yield Text(f"{found.about['model']}: {len(found.measured)} variants measured", style="bold")
    yield _table(found.measured, [measure_called(name) for name in columns], {}, found.measured)
    yield Text("")
    yield _notes(found, page)


def fronted(found: Sweep, front: Front, answers: Answers) -> Iterator[RenderableType]:
    """All variants with the measures of a front, those on it marked, and the answers that were asked for."""
    yield Text(
        f"{found.about['model']}: {len(front.members)} of {len(front.records)} variants are on the front", "bold"
    )
    marks = {front.records[place]["variant"]: "*" for place in front.members}
    if front.knee is not None:
        marks[front.records[front.knee]["variant"]] = "*<"
    yield _table(front.records, front.measures, marks, [front.records[place] for place in front.members])
    yield Text("")
    table = pairs()
    table.add_row("*", "no other is at least as good by every measure, and better by one")
    if front.knee is not None:
        table.add_row("*<", "the knee: where the front bends most, each axis from the front's best to its worst")
    corner = ", ".join(f"{m.name} {value(at)}" for m, at in zip(front.measures, front.reference, strict=True))
    table.add_row("hypervolume", f"{front.hypervolume:.4f} of the box from the best of each measure to {corner}")
    if left := len(found.records) - len(front.records):
        table.add_row("left out", f"{left} variants without one of the measures")
    for question, record in answers:
        table.add_row(question, record["variant"] if record is not None else "none")
    for measure in front.measures:
        table.add_row(measure.name, f"{measure.how}{'; higher is better' if measure.higher_is_better else ''}")
    yield table


def front_document(front: Front, answers: Answers) -> dict[str, Any]:
    """A front for programs."""
    names = [measure.name for measure in front.measures]
    return {
        "measures": [measure.to_dict() for measure in front.measures],
        "front": [_row(front.records[place], names) for place in front.members],
        "knee": None if front.knee is None else front.records[front.knee]["variant"],
        "hypervolume": front.hypervolume,
        "reference": dict(zip(names, front.reference, strict=True)),
        "ideal": dict(zip(names, front.ideal, strict=True)),
        "answers": [
            {"question": question, "variant": None if record is None else record["variant"], "record": record}
            for question, record in answers
        ],
        "variants": [_row(record, names) for record in front.records],
    }


def as_csv(found: Sweep, front: Front) -> str:
    """Every variant with all that was measured of it, and whether it is on the front."""
    members = {front.records[place]["variant"] for place in front.members}
    names = list(dict.fromkeys(name for record in found.measured for name in record["measures"]))
    labels = list(dict.fromkeys(name for record in found.measured for name in record["labels"]))
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["variant", "kind", *labels, *names, "front", "error"])
    for record in found.records:
        figures = [record.get("measures", {}).get(name) for name in names]
        about = [record["variant"], record["kind"], *(record["labels"].get(name) for name in labels)]
        table.writerow([*about, *figures, int(record["variant"] in members), record.get("error")])
    return buffer.getvalue()


def _row(record: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {"variant": record["variant"], "kind": record["kind"], **{n: record["measures"].get(n) for n in names}}


def _header(measure: Measure) -> str:
    return measure.name if measure.unit in ("", measure.name) else f"{measure.name} {measure.unit}"


def _table(
    records: Sequence[Mapping[str, Any]],
    measures: Sequence[Measure],
    marks: Mapping[str, str],
    bold: Sequence[Mapping[str, Any]],
) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    if marks:
        table.add_column("", no_wrap=True)
    table.add_column("variant", overflow="fold")
    for measure in measures:
        table.add_column(_header(measure), justify="right", no_wrap=True)
    names = {record["variant"] for record in bold}
    for record in sorted(records, key=lambda record: record["measures"].get(measures[0].name) or float("inf")):
        cells = [record["variant"], *(value(record["measures"].get(measure.name)) for measure in measures)]
        style = "bold" if marks and record["variant"] in names else ""
        table.add_row(*([marks.get(record["variant"], "")] if marks else []), *cells, style=style)
    return table


def _notes(found: Sweep, page: Path | None) -> Table:
    table = pairs()
    measurement = found.about["measurement"]
    settings: Mapping[str, Any] = next((r["evaluation"]["settings"] for r in found.measured), {})
    table.add_row("measured on", f"{measurement['text']}, {settings.get('windows')} windows of "
                  f"{settings.get('window_length')} tokens")  # fmt: skip
    for label, record in zip(repeated("failed"), found.failed, strict=False):
        table.add_row(label, f"{record['variant']}: {record['error']}")
    table.add_row("time", clock(found.seconds))
    if page is not None:
        table.add_row("report", str(page))
    table.add_row("next", f"quantlab pareto {found.folder} --under bits=3.5 --within ppl=1%")
    return table
