"""Walk all batches through the model together, and hand out the statistics of each input when all have arrived."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import torch
from torch import nn

from quantlab.engine.architecture import Architecture, features
from quantlab.engine.forward import Forward, shared_inputs, watched
from quantlab.engine.solve import PlannedLayer
from quantlab.engine.statistics import InputAccumulator
from quantlab.quantizers import InputStatistics, Statistic

# Tokens of the first batch that run ahead of the others to see which layers share an input.
_SCOUT_TOKENS = 8
# One batch in so many is held out of the comparison with the original model, to judge what the others say.
_HELD_OUT = 8


class Calibration:
    """All batches, standing at the same place of the model.

    Args:
        model: the model whose layers are being quantized; its weights are loaded and replaced by the caller.
        original: a twin that keeps its original weights, or None if no method asks for the shift between the two.
        architecture: the parts of both.
        batches: token ids, each int64 ``[sequences, length]``.
        outside: layers outside the blocks that will be observed after the last block.

    A context manager: leaving it cancels the forwards and removes the hooks.
    """

    def __init__(
        self,
        model: nn.Module,
        original: nn.Module | None,
        architecture: Architecture,
        batches: list[torch.Tensor],
        outside: Iterable[str],
    ) -> None:
        self.models = [model] if original is None else [model, original]
        self._architecture = architecture
        self._blocks = set(architecture.blocks)
        self._outside = set(outside)
        self._stops = self._blocks | self._outside
        self._twin_stops = set(self._stops)
        self._forwards = [Forward(model, batch, self._stops) for batch in batches]
        self._twins = [Forward(original, batch, self._twin_stops) for batch in batches] if original is not None else []
        self._scout = Forward(model, batches[0][:1, :_SCOUT_TOKENS], self._blocks)
        self._hooks = ExitStack()

    def __enter__(self) -> Calibration:
        """Start: every batch runs up to the first block."""
        for model in self.models:
            self._hooks.enter_context(watched(model, [*self._architecture.blocks, *self._architecture.all_layers]))
        self._scout.advance()
        self._advance(range(len(self._forwards)))
        return self

    def __exit__(self, *_: object) -> None:
        for forward in [self._scout, *self._forwards, *self._twins]:
            forward.cancel()
        self._hooks.close()

    def standing_before(self) -> str | None:
        """The block or layer before which the batches stand; None when they are through."""
        return self._forwards[0].at

    def pass_through(self) -> None:
        """Run every batch through the block before which it stands, without observing anything."""
        self._scout.advance()
        self._advance(range(len(self._forwards)))

    def observe(
        self, layers: list[PlannedLayer], *, last: bool
    ) -> Iterator[tuple[list[PlannedLayer], InputStatistics]]:
        """Run every batch through the block, stopping at ``layers``.

        Yields groups of layers that share an input, with its statistics. While a group is handed out the batches stand
        before it: the caller replaces the weights, and the batches go on through the new ones. Layers that no batch
        reached come at the end, with no tokens.

        Args:
            layers: of the block before which the batches stand, in the order of definition.
            last: nothing after these layers will be observed: the batches need not go on behind them.
        """
        groups = [[layer] for layer in layers]
        if self.standing_before() in self._blocks:
            groups = self._group(layers)
            names = {layer.name for layer in layers}
            self._stops |= names
            self._twin_stops |= names - self._architecture.routed
            self._advance(range(len(self._forwards)))
        while groups:
            # All stand before the same group, except where experts are skipped by batches without tokens for them.
            standing = {forward.at for forward in self._forwards}
            group = next((group for group in groups if any(layer.name in standing for layer in group)), None)
            if group is None:
                break
            names = {layer.name for layer in group}
            arrived = [index for index, forward in enumerate(self._forwards) if forward.at in names]
            statistics = self._statistics(group, arrived)
            groups.remove(group)
            yield group, statistics
            self._stops -= names
            self._twin_stops -= names
            if groups or not last:
                self._advance(arrived)
        for group in groups:
            yield group, InputStatistics(tokens=0)

    def _group(self, layers: list[PlannedLayer]) -> list[list[PlannedLayer]]:
        """Cut layers into groups with one input: seen by the scout, which runs through the block ahead of the others."""
        self._scout.log = []
        self._scout.advance()
        group_of = {name: group for group in shared_inputs(self._scout.log) for name in group}
        self._scout.log = None
        groups: list[list[PlannedLayer]] = []
        by_key: dict[str, list[PlannedLayer]] = {}
        for layer in layers:
            # Experts see tokens of their own, even where a few tokens of a scout cannot show it.
            shared = layer.name in group_of and layer.name not in self._architecture.routed
            key = group_of[layer.name][0] if shared else layer.name
            if key not in by_key:
                groups.append(by_key.setdefault(key, []))
            by_key[key].append(layer)
        return groups

    def _statistics(self, group: list[PlannedLayer], arrived: list[int]) -> InputStatistics:
        wanted = Statistic.NONE
        for layer in group:
            wanted |= layer.needs
        first = self._forwards[arrived[0]].input
        assert first is not None
        accumulator = InputAccumulator(wanted, group[0].shape[1], first.device)
        # Two models route tokens to experts differently, so there is no original input to compare an expert's with.
        paired = Statistic.SHIFT in wanted and group[0].name not in self._architecture.routed
        for index in arrived:
            x = self._forwards[index].input
            assert x is not None
            accumulator.add(x)
            original = self._twins[index].input if paired else None
            if original is not None:
                accumulator.compare(x, original, held_out=index % _HELD_OUT == _HELD_OUT - 1)
        return accumulator.finish()

    def _advance(self, indices: Iterable[int]) -> None:
        for index in indices:
            forward = self._forwards[index]
            forward.advance()
            if self._twins and forward.at is not None and forward.at not in self._architecture.routed:
                twin = self._twins[index]
                while twin.at != forward.at and not twin.dead:
                    twin.advance()
