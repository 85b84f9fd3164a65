"""The run: for each block load, observe, quantize, propagate, write.

    for block in model.blocks:                 # one block in memory at a time
        load(block)
        for group in block's linear layers:    # layers that share an input share its statistics
            run every batch up to the group    # through what is quantized already
            quantize(group)                    # and the batches go on through the result
        write(block); journal(block)           # a killed run loses one block

A block that an earlier, interrupted run finished is loaded from what that run wrote, and the batches run through it
without stopping: the same arithmetic as the first time, so the run ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from quantlab.checkpoint.source import ModelSource
from quantlab.engine.architecture import OUTSIDE, Architecture, add_to_bias, get_weight, set_weight
from quantlab.engine.awq import Rescaled, Rescaling
from quantlab.engine.behind import Behind
from quantlab.engine.distributed import ALONE, Ranks, SharedJournal
from quantlab.engine.journal import Journal
from quantlab.engine.loaded import LoadedWeights
from quantlab.engine.memory import return_freed_memory
from quantlab.engine.observe import Calibration
from quantlab.engine.packed import PackedBlock, restore
from quantlab.engine.progress import Progress, Silent
from quantlab.engine.rounded_inputs import inputs_rounded
from quantlab.engine.solve import Answer, PlannedLayer, solve
from quantlab.engine.spill import DiskMatrix, Spill
from quantlab.problem import InputStatistics, Statistic


@dataclass
class Run:
    """One model being quantized.

    Attributes:
        source: where weights come from.
        model: its skeleton on the meta device; weights come and go with the blocks.
        architecture: the model's parts.
        plan: what to do, by layer name; layers that stay as they are are not in it.
        batches: calibration token ids, each ``[sequences, length]``; empty if no method needs inputs.
        journal: where finished blocks are written and remembered.
        progress: told of each block and layer.
        rescaling: what is done to blocks before they are quantized, if anything.
        states: bytes of suspended batches that may be in memory, the others go to the disk; None: all stay.
        states_on_device: the same of the device that the source loads to, the others go to memory.
        statistics_wait: statistics wait on the disk while they are not in use.
        ranks: the processes that share the run.
    """

    source: ModelSource
    model: nn.Module
    architecture: Architecture
    plan: dict[str, PlannedLayer]
    batches: list[torch.Tensor]
    journal: Journal | SharedJournal
    progress: Progress = field(default_factory=Silent)
    rescaling: Rescaling | None = None
    states: int | None = None
    states_on_device: int | None = None
    statistics_wait: bool = False
    ranks: Ranks = ALONE
    _in_use: set[str] = field(default_factory=set, init=False)  # layers whose weights are the quantized ones
    _weights: LoadedWeights = field(init=False)

    def __post_init__(self) -> None:
        self._weights = LoadedWeights(self.source, self.model, self.architecture, self.plan.keys())

    @torch.no_grad()
    def execute(self) -> None:
        """Quantize every layer of the plan and write every block.

        Raises:
            CheckpointError: weights cannot be read or written. What was written stays, and the next run goes on there.
        """
        if self.batches:
            self._execute_calibrated()
        else:
            self._execute_unseen((*self.architecture.blocks, OUTSIDE))

    def _execute_calibrated(self) -> None:
        if self.journal.done(OUTSIDE):  # always the last to be committed
            return
        shifted = any(Statistic.SHIFT in layer.needs for layer in self.plan.values())
        models = [self.model, self.source.skeleton()] if shifted else [self.model]
        return_freed_memory()  # tokenizing leaves much behind
        self._load(OUTSIDE, [self.model])
        for twin in models[1:]:
            self._weights.share_outside(twin)
        looked_up = [self.plan[name] for name in self.architecture.embeddings if name in self.plan]
        outside = list(self._solve(_unseen(looked_up)))
        lookups = {answer.report.layer: answer.qtensor for answer in outside}
        original = models[1] if shifted else None
        remaining = set(self.architecture.blocks)
        waiting = {name: self.plan[name] for name in self.architecture.outside if name in self.plan}
        waiting = {name: layer for name, layer in waiting.items() if layer.needs}
        with (
            self._weights.embeddings_on_demand(models, lookups),
            self._calibration(original, list(waiting)) as calibration,
            # What is observed of an input is observed before it is rounded: these hooks run after those of Calibration.
            inputs_rounded(self.model, self._activations, begun=lambda name: name in self._in_use),
        ):
            self._unload(OUTSIDE, models)
            while (remaining or waiting) and (at := calibration.standing_before()) is not None:
                if at in waiting:  # before the blocks (a projection of the embedding) or behind them (a head)
                    layer = waiting.pop(at)
                    self._weights.load(OUTSIDE, [self.model])  # a head may be tied to an embedding
                    outside += self._solve(calibration.observe([layer], last=not (remaining or waiting)))
                    continue
                remaining.discard(at)
                last = not (remaining or waiting)
                self._load(at, models)
                rescaled = self._rescale(at, calibration)
                if self.journal.done(at):  # in an earlier run, or in this one: some models run a block several times
                    self._restore(at)
                    if not last:
                        calibration.pass_through()
                else:
                    groups = calibration.observe(self._planned(at), last=last, divisors=rescaled.divisors)
                    self._commit(at, self._solve(groups, rescaled.notes))
                self._unload(at, models)
        self._execute_unseen(self.architecture.blocks)  # those that no token reached: a vision tower
        self._weights.load(OUTSIDE, [self.model])
        done = {answer.report.layer for answer in outside}
        rest = [layer for layer in self._planned(OUTSIDE) if layer.name not in done]
        self._commit(OUTSIDE, [*outside, *self._solve(_unseen(rest))])

    def _calibration(self, original: nn.Module | None, outside: list[str]) -> Calibration:
        """The batches, to be walked through the model together; the disk takes what memory has no room for."""
        device, folder = self.source.device, self.journal.folder
        return Calibration(
            self.model,
            original,
            self.architecture,
            [batch.to(device) for batch in self.batches],
            outside,
            sample=None if self.rescaling is None else self.rescaling.sample.to(device),
            spill=Spill(folder, self.states, self.states_on_device),
            ranks=self.ranks,
            disk=partial(DiskMatrix, folder) if self.statistics_wait else None,
        )

    def _rescale(self, block: str, calibration: Calibration) -> Rescaled:
        """Rescale a block that is still as it was loaded; one that is done already is only passed by the sample."""
        if self.rescaling is None:
            return Rescaled()
        ahead = calibration.look_ahead()
        return Rescaled() if self.journal.done(block) else self.rescaling.apply(block, ahead, self._planned(block))

    def _execute_unseen(self, blocks: Iterable[str]) -> None:
        """Quantize the blocks that are not done yet, without any inputs; each rank takes one at a time.

        A block is written while the next one is at work; no more than one waits.
        """
        left = [block for block in blocks if not self.journal.done(block)]
        with self.source.memory_reused(), Behind() as behind:
            for start in range(0, len(left), self.ranks.size):
                together, packed = left[start : start + self.ranks.size], None
                for block in together[self.ranks.rank : self.ranks.rank + 1]:
                    self._load(block, [self.model])
                    packed = self._packed(block, self._solve(_unseen(self._planned(block)), used=False))
                    self._unload(block, [self.model])
                for owner, block in enumerate(together):
                    behind.call(self.journal.commit, block, *(self.ranks.to_writer(packed, owner) or ({}, [], {})))

    def _solve(
        self,
        groups: Iterable[tuple[list[PlannedLayer], InputStatistics | None]],
        notes: Mapping[str, str] | None = None,
        *,
        used: bool = True,
    ) -> Iterator[Answer]:
        """Solve groups of layers as they come, and put the quantized weights in their places.

        Args:
            groups: layers that share an input, with its statistics.
            notes: by layer, to be added to its report.
            used: the model will run through the new weights, on all ranks; otherwise a layer has none from then on.
        """
        for group, statistics in groups:
            if used:
                return_freed_memory()  # before and after a solve: both leave holes where the other's needs do not fit
            modules = {layer.name: self.model.get_submodule(layer.name) for layer in group}
            weights = {name: get_weight(module) for name, module in modules.items()}
            if not any(layer.needs for layer in group):
                statistics = None  # tokens passed, but nobody looked at them
            for answer in solve(group, weights, statistics, notes, self.ranks if used else ALONE):
                module = modules[answer.report.layer]
                if used:
                    set_weight(module, answer.qtensor.dequantize(get_weight(module).dtype))
                    self._in_use.add(answer.report.layer)
                else:
                    module.weight = nn.Parameter(module.get_parameter("weight").to("meta"), requires_grad=False)
                if answer.bias is not None:
                    add_to_bias(module, answer.bias)
                self.progress.layer(answer.report)
                yield replace(answer, qtensor=answer.qtensor.to("cpu"))  # the device is for one block
            del weights, statistics  # the next group's come while this one's would be waiting to be replaced
            if used:
                return_freed_memory()

    def _commit(self, block: str, answers: Iterable[Answer]) -> None:
        """Write a block."""
        self.journal.commit(block, *self._packed(block, answers))

    def _packed(self, block: str, answers: Iterable[Answer]) -> PackedBlock:
        return PackedBlock.of(block, self.model, self.architecture, answers, self._activations)

    def _restore(self, block: str) -> None:
        """Give a finished block everything that is stored of it."""
        quantized, rest = self.journal.read(block)
        restore(self.model, quantized, rest, self.source.device)
        self._in_use.update(quantized)

    @property
    def _activations(self) -> dict[str, str]:
        """What each layer's inputs are rounded to."""
        return {name: layer.scheme.activations for name, layer in self.plan.items()}

    def _planned(self, block: str) -> list[PlannedLayer]:
        outside = (*self.architecture.embeddings, *self.architecture.outside)
        names = self.architecture.layers[block] if block else outside
        return [self.plan[name] for name in names if name in self.plan]

    def _load(self, block: str, models: list[nn.Module]) -> None:
        self.progress.block(block)
        self._weights.load(block, models)

    def _unload(self, block: str, models: list[nn.Module]) -> None:
        self._weights.unload(block, models)


def _unseen(layers: Iterable[PlannedLayer]) -> Iterator[tuple[list[PlannedLayer], InputStatistics | None]]:
    """Layers that no token reached, one by one."""
    for layer in layers:
        yield [layer], InputStatistics(tokens=0) if layer.needs else None
