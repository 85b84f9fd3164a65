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

import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from quantlab.checkpoint.native import layer_tensors
from quantlab.checkpoint.source import ModelSource
from quantlab.engine.architecture import Architecture, get_weight, set_weight
from quantlab.engine.journal import Journal
from quantlab.engine.observe import Calibration
from quantlab.engine.progress import Progress, Silent
from quantlab.engine.solve import PlannedLayer, solve
from quantlab.nn import Storage
from quantlab.numerics import QTensor
from quantlab.quantizers import InputStatistics, Statistic

# The name of what is in no block: embeddings, the last norm, the head.
OUTSIDE = ""


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
    """

    source: ModelSource
    model: nn.Module
    architecture: Architecture
    plan: dict[str, PlannedLayer]
    batches: list[torch.Tensor]
    journal: Journal
    progress: Progress = field(default_factory=Silent)

    @torch.no_grad()
    def execute(self) -> None:
        """Quantize every layer of the plan and write every block.

        Raises:
            CheckpointError: weights cannot be read or written. What was written stays, and the next run goes on there.
        """
        if self.batches:
            self._execute_calibrated()
        else:
            for block in (*self.architecture.blocks, OUTSIDE):
                if not self.journal.done(block):
                    self._load(block, [self.model])
                    self._quantize(block, (([layer], None) for layer in self._planned(block)))
                    self._unload(block, [self.model])

    def _execute_calibrated(self) -> None:
        shifted = any(Statistic.SHIFT in layer.needs for layer in self.plan.values())
        models = [self.model, self.source.skeleton()] if shifted else [self.model]
        _return_freed_memory()  # tokenizing leaves much behind
        self._load(OUTSIDE, [self.model])
        for twin in models[1:]:
            self._share_outside(twin)
        outside = [layer.name for layer in self._planned(OUTSIDE) if layer.needs]
        original = models[1] if shifted else None
        with Calibration(self.model, original, self.architecture, self.batches, outside) as calibration:
            remaining = [*self.architecture.blocks]
            while remaining:
                standing = calibration.standing_before()
                block = standing if standing in remaining else remaining[0]
                remaining.remove(block)
                self._load(block, models)
                last = not remaining and not outside
                if self.journal.done(block):
                    self._restore(block)
                    if not last:
                        calibration.pass_through()
                else:
                    self._quantize(block, calibration.observe(self._planned(block), last=last))
                self._unload(block, models)
            if not self.journal.done(OUTSIDE):
                self._quantize(OUTSIDE, calibration.observe(self._planned(OUTSIDE), last=True))

    def _quantize(self, block: str, groups: Iterator[tuple[list[PlannedLayer], InputStatistics | None]]) -> None:
        """Solve the groups of a block as they come, and write the block."""
        quantized: dict[str, QTensor] = {}
        reports = []
        for group, statistics in groups:
            modules = {layer.name: self.model.get_submodule(layer.name) for layer in group}
            weights = {name: get_weight(module) for name, module in modules.items()}
            for qtensor, report in solve(group, weights, statistics):
                quantized[report.layer] = qtensor
                set_weight(modules[report.layer], qtensor.dequantize(weights[report.layer].dtype))
                reports.append(report)
                self.progress.layer(report)
        storages = {
            name: Storage.of(qtensor, bias=self.model.get_submodule(name).bias is not None)
            for name, qtensor in quantized.items()
        }
        self.journal.commit(block, self._tensors(block, quantized), reports, storages)

    def _tensors(self, block: str, quantized: dict[str, QTensor]) -> dict[str, torch.Tensor]:
        """Everything that is stored of a block: codes and scales of quantized layers, the rest as it is."""
        tensors: dict[str, torch.Tensor] = {}
        stored: set[tuple[int, torch.Size]] = set()
        for name, tensor in self.model.state_dict().items():
            owner = name.removesuffix(".weight")
            tied = (tensor.data_ptr(), tensor.shape) in stored
            if self._belongs(name, block) and owner not in quantized and not tied:
                tensors[name] = tensor
                stored.add((tensor.data_ptr(), tensor.shape))
        for name, qtensor in quantized.items():
            tensors |= layer_tensors(name, qtensor)
        return tensors

    def _restore(self, block: str) -> None:
        """Give the layers of a finished block the weights that an earlier run left in it."""
        for name, qtensor in self.journal.read(block).items():
            module = self.model.get_submodule(name)
            set_weight(module, qtensor.dequantize(get_weight(module).dtype))

    def _planned(self, block: str) -> list[PlannedLayer]:
        names = self.architecture.layers[block] if block else self.architecture.outside
        return [self.plan[name] for name in names if name in self.plan]

    def _belongs(self, name: str, block: str) -> bool:
        return (self.architecture.block_of(name) or OUTSIDE) == block

    def _load(self, block: str, models: list[nn.Module]) -> None:
        self.progress.block(block)
        for model in models:
            self.source.load(model, lambda name: self._belongs(name, block))

    def _share_outside(self, twin: nn.Module) -> None:
        """Let the twin use the model's own embeddings and norms: nothing outside the blocks differs before the end."""
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if self._belongs(name, OUTSIDE):
                owner, _, leaf = name.rpartition(".")
                setattr(twin.get_submodule(owner), leaf, parameter)
        self.source.load(twin, lambda name: self._belongs(name, OUTSIDE))  # persistent buffers

    def _unload(self, block: str, models: list[nn.Module]) -> None:
        for model in models:
            self.source.unload(model, lambda name: self._belongs(name, block))
        _return_freed_memory()


def _return_freed_memory() -> None:
    """Give freed memory back to the system, where the C library keeps it (glibc): it fragments block by block."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
