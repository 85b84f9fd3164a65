"""One pass over the original model that tries many schemes on each layer and keeps none of the results.

    for block in model.blocks:                 # one block in memory at a time
        load(block)
        for group in block's chosen layers:    # statistics of a shared input are taken once,
            for plan in plans:                 # and every plan is solved with them
                measure(solve(group, plan))
        unload(block)                          # the weights were never replaced

So every layer is measured with the inputs that it has in the original model, whatever is tried on the layers before it.
Blocks behind the last chosen layer are not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import nn

from quantlab.checkpoint.source import ModelSource
from quantlab.engine.architecture import OUTSIDE, Architecture, get_weight
from quantlab.engine.memory import return_freed_memory
from quantlab.engine.observe import Calibration
from quantlab.engine.progress import Progress, Silent
from quantlab.engine.report import LayerReport
from quantlab.engine.selection import Plan, wanted
from quantlab.engine.solve import PlannedLayer, solve
from quantlab.errors import RecipeError
from quantlab.problem import InputStatistics, LayerProblem, Solution, Statistic
from quantlab.quantizers import Quantizer
from quantlab.recipe import Scheme


@dataclass(frozen=True)
class Measured:
    """A layer under one plan.

    Attributes:
        plan: the index of the plan.
        report: what was done, and the error in the best metric that is known.
        weight_error: ``|W - Q|^2 / |W|^2``.
        energy: what a relative error is of: the mean squared output ``tr(W H W^T)``, or ``|W|^2`` where no input was
            seen.
    """

    plan: int
    report: LayerReport
    weight_error: float
    energy: float


@dataclass(frozen=True)
class Observing:
    """What stands where a rounding method would while inputs are only observed: it wants what all plans want."""

    wanted: Statistic
    name: ClassVar[str] = "observing"

    def needs(self, scheme: Scheme) -> Statistic:  # noqa: ARG002
        """What is kept."""
        return self.wanted

    def quantize(self, problem: LayerProblem, scheme: Scheme) -> Solution:
        """Never called: the plans' own methods solve."""
        raise NotImplementedError


@dataclass
class Survey:
    """One model being tried.

    Attributes:
        source: where weights come from, and on which device they are tried.
        model: its skeleton on the meta device; weights come and go with the blocks.
        architecture: the model's parts.
        plans: ways to quantize, each with the same layers by name.
        batches: calibration token ids, each ``[sequences, length]``; empty if no input is to be seen.
        progress: told of each block, and of each layer once for every plan.
        rows: how many outputs of each layer are solved, to estimate its error from; None: all. Plans that repair a
            layer as a whole always see all of it.
        look: shown each group's quantized weights before they are dropped: by plan and layer, float32 ``[out, in]``.
        refused: plans, by index, whose method refused a layer when it saw it, and the reason.
        groups: names of layers that share an input, in the order in which the model runs.
    """

    source: ModelSource
    model: nn.Module
    architecture: Architecture
    plans: list[Plan]
    batches: list[torch.Tensor]
    progress: Progress = field(default_factory=Silent)
    rows: int | None = None
    look: Callable[[tuple[str, ...], dict[int, dict[str, torch.Tensor]]], None] | None = None
    refused: dict[int, str] = field(default_factory=dict, init=False)
    groups: list[tuple[str, ...]] = field(default_factory=list, init=False)
    _measured: list[Measured] = field(default_factory=list, init=False)

    @torch.no_grad()
    def execute(self) -> list[Measured]:
        """Measure every layer under every plan, in the order in which the model runs.

        A plan that is refused on the way ends up in ``refused``; what was measured of it is dropped.

        Raises:
            CheckpointError: weights cannot be read, or weights or inputs are not finite.
        """
        places = list(dict.fromkeys(layer.block for layer in self.plans[0].values()))
        if self.batches:
            places = self._observe(places)
        for place in places:  # without inputs, or no token reaches them: a vision tower
            self._load(place)
            for layer in self._chosen(place):
                self._try([layer], InputStatistics(tokens=0) if self.batches else None)
            self._unload(place)
        return [found for found in self._measured if found.plan not in self.refused]

    def _observe(self, places: list[str]) -> list[str]:
        """Walk the batches through the model; returns the places that they did not come to."""
        remaining = {place for place in places if place != OUTSIDE}
        waiting = {layer.name: layer for layer in self._chosen(OUTSIDE)}
        self._load(OUTSIDE)
        batches = [batch.to(self.source.device) for batch in self.batches]
        with Calibration(self.model, None, self.architecture, batches, list(waiting)) as calibration:
            while (remaining or waiting) and (at := calibration.standing_before()) is not None:
                if at in waiting:
                    layers = [waiting.pop(at)]
                else:
                    self._load(at)
                    layers = self._chosen(at) if at in remaining else []  # some models run a block several times
                    remaining.discard(at)
                if layers:
                    for group, statistics in calibration.observe(layers, last=not (remaining or waiting)):
                        self._try(group, statistics)
                else:
                    calibration.pass_through()
                if at in self.architecture.layers:
                    self._unload(at)
        for layer in waiting.values():
            self._try([layer], InputStatistics(tokens=0))
        return [place for place in places if place in remaining]

    def _chosen(self, place: str) -> list[PlannedLayer]:
        """The chosen layers of a block, each asking for all that any plan asks for."""
        observing: Quantizer = Observing(wanted(self.plans) | Statistic.SECOND_MOMENT)
        layers = [layer for layer in self.plans[0].values() if layer.block == place]
        return [replace(layer, quantizer=observing, compensation=None) for layer in layers]

    def _try(self, group: list[PlannedLayer], statistics: InputStatistics | None) -> None:
        """Solve a group of layers that share an input, under every plan."""
        self.groups.append(tuple(layer.name for layer in group))
        weights = {layer.name: get_weight(self.model.get_submodule(layer.name)) for layer in group}
        some = {name: _SomeRows.of(weight, self.rows, statistics) for name, weight in weights.items()}
        shown: dict[int, dict[str, torch.Tensor]] = {}
        for index, plan in enumerate(self.plans):
            if index in self.refused:
                continue
            return_freed_memory()
            try:
                found = list(self._solve([plan[layer.name] for layer in group], weights, some, statistics))
            except RecipeError as error:
                self.refused[index] = str(error)
                continue
            for report, weight_error, quantized in found:
                self._measured.append(Measured(index, report, weight_error, some[report.layer].energy))
                if self.look is not None:
                    shown.setdefault(index, {})[report.layer] = quantized
                self.progress.layer(report)
        if self.look is not None:
            self.look(self.groups[-1], shown)

    def _solve(
        self,
        layers: list[PlannedLayer],
        weights: Mapping[str, torch.Tensor],
        some: Mapping[str, _SomeRows],
        statistics: InputStatistics | None,
    ) -> Iterator[tuple[LayerReport, float, torch.Tensor]]:
        """Solve a group under one plan: reports of all rows, and of those that were solved errors and weights."""
        whole = any(layer.compensation is not None for layer in layers)
        parts = weights if whole else {name: rows.weight for name, rows in some.items()}
        for answer in solve(layers, parts, statistics):
            report, solved, quantized = answer.report, parts[answer.report.layer], answer.qtensor.dequantize()
            if not whole:
                report = some[report.layer].extended(report, weights[report.layer].shape)
            yield report, _weight_error(solved.float(), quantized), quantized

    def _load(self, place: str) -> None:
        self.progress.block(place)
        self.source.load(self.model, lambda name: self._belongs(name, place))

    def _unload(self, place: str) -> None:
        self.source.unload(self.model, lambda name: self._belongs(name, place))
        return_freed_memory()

    def _belongs(self, name: str, place: str) -> bool:
        return self.architecture.place_of(name) == place


@dataclass(frozen=True, eq=False)
class _SomeRows:
    """Rows of a weight that stand for all of them.

    A method's squared error of a row grows with the squares of its weights, so rows are drawn evenly over the order of
    their norms, and the sum over all is the sum over some, times the ratio of the squares. That ratio varies far less
    between draws than that of the outputs' energies, of which a few rows may have the most.

    Attributes:
        weight: the rows.
        energy: of all rows, see :class:`Measured`.
        correction: what a relative error of these rows is multiplied by to be that of all.
    """

    weight: torch.Tensor
    energy: float
    correction: float = 1.0

    @classmethod
    def of(cls, weight: torch.Tensor, count: int | None, statistics: InputStatistics | None) -> _SomeRows:
        """``count`` rows of ``weight [out, in]``, or all of them."""
        full, tiny = weight.float(), torch.finfo(torch.float32).tiny
        squares = full.square().sum(1)
        moment = statistics.second_moment if statistics is not None and statistics.tokens else None
        energies = squares if moment is None else ((full @ moment) * full).sum(1)
        energy = float(energies.sum())
        if count is None or count >= len(weight):
            return cls(weight, energy)
        places = ((torch.arange(count) + 0.5) * len(weight) / count).long()
        drawn = squares.argsort()[places].sort().values
        share = squares[drawn].sum() / squares.sum().clamp(min=tiny)
        inside = energies[drawn].sum() / energies.sum().clamp(min=tiny)
        return cls(weight[drawn], energy, float(inside / share.clamp(min=tiny)))

    def extended(self, report: LayerReport, shape: torch.Size) -> LayerReport:
        """A report of these rows as one of all rows, its bytes in proportion."""
        if len(self.weight) == shape[0]:
            return report
        size = round(report.bytes * shape[0] / len(self.weight))
        return replace(report, shape=(shape[0], shape[1]), error=report.error * self.correction, bytes=size)


def _weight_error(weight: torch.Tensor, quantized: torch.Tensor) -> float:
    energy = weight.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    return float((weight - quantized).square_().sum() / energy)
