"""The sweep: a record a variant, appended as it ends; stopped and continued at will."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from quantlab_evals import fingerprint_folder

from quantlab.checkpoint.resolve import resolve, source_of
from quantlab.engine import preflight
from quantlab.engine.architecture import describe
from quantlab.engine.device import choose_placement
from quantlab.errors import DataError, PreflightError, QuantlabError
from quantlab.evaluation.records import Records
from quantlab.sweep.space import Candidate, Space, SpaceSource, load_space
from quantlab.sweep.workbench import Setup, Workbench, check

RECORDS = "records.jsonl"
ABOUT = "sweep.json"
_LOCK = ".lock"


class Watcher(Protocol):
    """Told how a sweep goes."""

    def begin(self, names: Sequence[str], known: int) -> None:
        """Everything is checked: the rows, and how many of them have a record already."""

    def working(self, name: str, doing: str) -> None:
        """A variant, or the original, is at work."""

    def ended(self, record: Mapping[str, Any]) -> None:
        """A variant has its record."""


class Unwatched:
    """Tells nobody."""

    def begin(self, names: Sequence[str], known: int) -> None:
        """Nothing."""

    def working(self, name: str, doing: str) -> None:
        """Nothing."""

    def ended(self, record: Mapping[str, Any]) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep has found so far.

    Attributes:
        folder: where it is.
        about: the model, how variants are measured, and the rows' names.
        records: one a row, in the order of the space; those that are not done yet are not among them.
        seconds: that this run took; 0 if it was read.
    """

    folder: Path
    about: Mapping[str, Any]
    records: tuple[dict[str, Any], ...]
    seconds: float = 0.0

    @property
    def measured(self) -> tuple[dict[str, Any], ...]:
        """The records of variants that did not fail."""
        return tuple(record for record in self.records if "error" not in record)

    @property
    def failed(self) -> tuple[dict[str, Any], ...]:
        """The records of variants that failed."""
        return tuple(record for record in self.records if "error" in record)

    @property
    def original(self) -> dict[str, Any] | None:
        """The record of the original."""
        return next((record for record in self.measured if record["kind"] == "original"), None)

    def to_dict(self) -> dict[str, Any]:
        """A JSON mapping."""
        return {"folder": str(self.folder), **self.about, "seconds": self.seconds, "records": list(self.records)}


Job = tuple[Candidate, str]
"""A row and the key of its record."""
Runner = Callable[[Setup, Sequence[Job], Watcher], Iterator[tuple[str, dict[str, Any]]]]
"""Makes the records of some rows, in any order: what runs here, or elsewhere."""


def sweep(
    model: str | Path,
    space: SpaceSource | Space,
    out: str | Path,
    *,
    overrides: Iterable[str] = (),
    setup: Setup | None = None,
    extend: bool = False,
    watcher: Watcher | None = None,
    runner: Runner | None = None,
) -> Sweep:
    """Quantize a model in every way of a space and measure each: a record a variant, in ``out/records.jsonl``.

    Interrupted and called again with the same arguments it goes on with what is not there yet, in the middle of a
    variant where quantizing it had begun. A variant that fails is recorded with its error, the others go on, and it is
    tried again the next time.

    Args:
        model: a folder, a ``.gguf`` file, a Hugging Face id, ``demo``.
        space: a ready space's name, a YAML file, a mapping; see :mod:`quantlab.sweep.space`.
        out: a folder for the records, and for quantized models while they are needed.
        overrides: ``key=value`` changes to every recipe of the space.
        setup: how variants are measured; its model and folder are those that are given here.
        extend: take a space that differs from that of an earlier call; records of variants that are in both count.
        watcher: told how it goes.
        runner: who does the work; None: this process, one variant after another.

    Raises:
        QuantlabError: a model, space or setting that cannot be; a folder that holds another sweep, or in which one is
            running.
        EvalError: text that is not found or too short.
    """
    started = time.perf_counter()
    watcher = watcher or Unwatched()
    folder = Path(out).expanduser().absolute()
    setup = replace(setup or Setup(), model=str(model), folder=folder)
    chosen = space if isinstance(space, Space) else load_space(space, overrides)
    fingerprint = fingerprint_folder(resolve(setup.model))
    check(setup)
    measurement = _measurement(setup)
    jobs = [(candidate, _key(fingerprint, candidate, measurement)) for candidate in chosen.candidates]
    about = {
        "model": setup.model,
        "fingerprint": fingerprint,
        "space": chosen.name,
        "measurement": measurement,
        "rows": [{"name": candidate.name, "key": key} for candidate, key in jobs],
    }
    _prepare(folder, about, extend)
    with _locked(folder):
        records = Records(folder / RECORDS)
        waiting = [(candidate, key) for candidate, key in jobs if records.get(key) is None]
        watcher.begin([candidate.name for candidate in chosen.candidates], len(jobs) - len(waiting))
        refused = _refused(setup, waiting)
        for key, record in refused.items():
            watcher.ended(records.append(key, record))
        rest = [(candidate, key) for candidate, key in waiting if key not in refused]
        for key, record in (runner or in_turn)(setup, rest, watcher) if rest else ():
            watcher.ended(records.append(key, record))
    return replace(read_sweep(folder), seconds=time.perf_counter() - started)


def read_sweep(folder: str | Path) -> Sweep:
    """The records of a sweep, finished or not.

    Raises:
        DataError: there is none.
    """
    folder = Path(folder).expanduser()
    file = folder / ABOUT
    if not file.is_file():
        raise DataError(f"{folder}: holds no sweep; give the folder that `quantlab sweep --out` wrote")
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        records = Records(folder / RECORDS)
        found = [(row["name"], records.last(row["key"])) for row in about["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    return Sweep(folder, about, tuple({**record, "variant": name} for name, record in found if record is not None))


def in_turn(setup: Setup, jobs: Sequence[Job], watcher: Watcher) -> Iterator[tuple[str, dict[str, Any]]]:
    """One variant after another, in this process."""
    bench = Workbench(setup, lambda doing: watcher.working("original", doing))
    for candidate, key in jobs:
        yield key, bench.record(candidate, key, lambda doing, name=candidate.name: watcher.working(name, doing))


def _measurement(setup: Setup) -> dict[str, Any]:
    """What figures depend on, beside model and variant; JSON-able."""
    given = {
        "text": setup.text,
        **{name: value for name, value in sorted(setup.settings.items()) if value is not None},
        "speed": None if setup.speed is None else asdict(setup.speed),
        "devices": setup.devices,
    }
    kind = choose_placement(setup.device).device.type
    if kind != "cpu":  # whose records are as old as sweeps, and say nothing of it
        given["device"] = kind
    return dict(json.loads(json.dumps(given)))


def _key(fingerprint: str, candidate: Candidate, measurement: Mapping[str, Any]) -> str:
    depends_on = json.dumps([fingerprint, candidate.identity(), measurement], sort_keys=True)
    return hashlib.sha256(depends_on.encode()).hexdigest()[:32]


def _prepare(folder: Path, about: Mapping[str, Any], extend: bool) -> None:
    """Make the folder, or see that it holds the same sweep."""
    file = folder / ABOUT
    if file.is_file():
        before = read_sweep(folder).about
        fixed = [name for name in ("fingerprint", "measurement") if before[name] != about[name]]
        if fixed:
            what = "another model" if fixed[0] == "fingerprint" else f"other settings ({_differences(before, about)})"
            raise PreflightError(
                f"{folder} holds a sweep of {what}; run the command that began it to go on, or choose another --out"
            )
        if before["rows"] != about["rows"] and not extend:
            names = [{row["name"] for row in rows["rows"]} for rows in (before, about)]
            differs = sorted(names[0] ^ names[1]) or ["their recipes or their order"]
            raise PreflightError(
                f"{folder} holds a sweep of another space (it differs in {', '.join(differs[:5])}); run the command "
                "that began it, add --extend to go on with this space and keep the records of what is in both, or "
                "choose another --out"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise PreflightError(f"{folder} holds something that is no sweep; choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{ABOUT}.partial")
        partial.write_text(json.dumps(about, indent=1), encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        raise PreflightError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from error


def _differences(before: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    old, new = before["measurement"], about["measurement"]
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return ", ".join(f"{name} {old.get(name)!r}, now {new.get(name)!r}" for name in names)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else runs a sweep in this folder meanwhile; a lock ends with its process."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PreflightError(f"{folder}: another process runs a sweep there; let it end, or stop it") from error
        yield


def _refused(setup: Setup, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """Records of the rows that do not fit the model: found before an hour is spent on the others."""
    skeleton = source_of(setup.model).skeleton()
    architecture = describe(skeleton)
    refused = {}
    for candidate, key in jobs:
        if candidate.recipe is None:
            continue
        try:
            preflight.plan(candidate.recipe, architecture, skeleton)
        except QuantlabError as error:
            about = {"variant": candidate.name, "kind": candidate.kind, "labels": candidate.labels()}
            kind = type(error).__name__
            refused[key] = {**about, "recipe": candidate.recipe.to_dict(), "error": str(error), "error_kind": kind}
    return refused
