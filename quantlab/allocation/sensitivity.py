"""What each layer loses under each candidate: measured once, kept as JSON, used for any budget."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.errors import DataError
from quantlab.recipe import Scheme
from quantlab.variants import Variant

# Of files; one that was written by another version is measured anew.
VERSION = 2
NATS = "KL divergence from the original, nats a token"
"""The unit of losses that predict something; others only order."""


@dataclass(frozen=True)
class Unit:
    """Layers that were measured together: one, or an item.

    Attributes:
        layers: their names.
        losses: by candidate; infinite where a candidate cannot be had.
        errors: relative squared error of their output by candidate, where it is known: to explain, not to choose by.
    """

    layers: tuple[str, ...]
    losses: tuple[float, ...]
    errors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Pair:
    """What two units lose more than the sum of both: ``losses[k][l]`` with candidates k and l."""

    first: int
    second: int
    losses: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Sensitivity:
    """Losses of units under candidates.

    Attributes:
        method: which sensitivity.
        unit: what losses are, in words; :data:`NATS` where they predict.
        candidates: by name.
        units: in the order in which the model runs.
        groups: layers that share an input.
        pairs: of units, see :mod:`quantlab.allocation.pairwise`.
        identity: what the losses depend on: model, candidates, calibration, method and its options, version.
        calibration: how the text came about.
        notes: what a person should know.
        seconds: that measuring took.
        cpu_seconds: of all threads.
    """

    method: str
    unit: str
    candidates: tuple[Variant, ...]
    units: tuple[Unit, ...]
    groups: tuple[tuple[str, ...], ...]
    pairs: tuple[Pair, ...] = ()
    identity: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def predicts(self) -> bool:
        """Whether losses are nats a token, not only an order."""
        return self.unit == NATS

    def of_items(self, items: Sequence[Sequence[str]]) -> np.ndarray:
        """Losses ``[items, candidates]``: sums over the units of each item.

        Raises:
            DataError: a unit belongs to several items: it was measured for larger ones.
        """
        found = np.zeros((len(items), len(self.candidates)))
        item_of = {name: number for number, members in enumerate(items) for name in members}
        for unit in self.units:
            numbers = {item_of[name] for name in unit.layers if name in item_of}
            if len(numbers) > 1:
                raise DataError(
                    f"{', '.join(unit.layers)}: were measured together and can only be given the same scheme; "
                    "measure them anew, each by itself"
                )
            for number in numbers:
                found[number] += unit.losses
        return found

    def pairs_of_items(self, items: Sequence[Sequence[str]]) -> dict[tuple[int, int], np.ndarray]:
        """The losses of pairs of items."""
        item_of = {name: number for number, members in enumerate(items) for name in members}
        number_of = [item_of[unit.layers[0]] for unit in self.units]
        found: dict[tuple[int, int], np.ndarray] = {}
        for pair in self.pairs:
            i, j, terms = number_of[pair.first], number_of[pair.second], np.array(pair.losses)
            if i != j:
                key, terms = ((i, j), terms) if i < j else ((j, i), terms.T)
                found[key] = found.get(key, 0) + terms
        return found

    def to_dict(self) -> dict[str, Any]:
        """A JSON mapping that :meth:`from_dict` reads back; infinite losses are null."""
        data = asdict(self)
        for unit in data["units"]:
            unit["losses"] = [loss if math.isfinite(loss) else None for loss in unit["losses"]]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """Undo :meth:`to_dict`."""
        plain = dict(data)
        plain["candidates"] = tuple(Variant(entry["name"], Scheme(**entry["scheme"])) for entry in data["candidates"])
        plain["units"] = tuple(
            Unit(
                tuple(unit["layers"]),
                tuple(math.inf if loss is None else loss for loss in unit["losses"]),
                tuple(unit["errors"]),
            )
            for unit in data["units"]
        )
        plain["groups"] = tuple(tuple(group) for group in data["groups"])
        plain["pairs"] = tuple(
            Pair(pair["first"], pair["second"], tuple(tuple(row) for row in pair["losses"])) for pair in data["pairs"]
        )
        plain["notes"] = tuple(data["notes"])
        return cls(**plain)


def read(file: Path, identity: Mapping[str, Any]) -> Sensitivity | None:
    """The sensitivity in a file, or None: there is none, or it is of something else or of another version."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["identity"] != json.loads(json.dumps(identity)):
            return None
        return Sensitivity.from_dict(data)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(file: Path, sensitivity: Sensitivity) -> None:
    """Write it beside, then put it in its place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(file.name + ".partial")
    beside.write_text(json.dumps(sensitivity.to_dict()), encoding="utf-8")
    beside.replace(file)
