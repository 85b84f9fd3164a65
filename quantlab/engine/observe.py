"""Walk all batches through the model together, and hand out the statistics of each input when all have arrived."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from quantlab.engine.architecture import Architecture
from quantlab.engine.awq import Ahead
from quantlab.engine.distributed import ALONE, Ranks
from quantlab.engine.forward import Forward, shared_inputs, watched
from quantlab.engine.solve import PlannedLayer
from quantlab.engine.spill import Spill
from quantlab.engine.statistics import InputAccumulator, OnDisk
from quantlab.problem import InputStatistics, Statistic

# Tokens of the first batch that run ahead of the others to see which layers share an input.
_SCOUT_TOKENS = 32
# Every second batch is not compared with the original model: the comparison costs as much as all the rest. One batch in
# eight is held out of it, to judge what the others say.
_NOT_COMPARED = 2
_HELD_OUT = 8


class Calibration:
    """All batches, standing at the same place of the model.

    Args:
        model: the model whose layers are being quantized; its weights are loaded and replaced by the caller.
        original: a twin that keeps its original weights, or None if no method asks for the shift between the two.
        architecture: the parts of both.
        batches: token ids, each int64 ``[sequences, length]``, on the device where the models compute.
        outside: layers outside the blocks that will be observed after the last block.
        sample: token ids that go ahead of the batches, see :meth:`look_ahead`; None if nobody will.
        spill: where the states of batches go that memory has no room for; None: they stay.
        ranks: the processes that share the batches.
        disk: where statistics wait that are not in use; None: in memory.

    A context manager: leaving it cancels the forwards and removes the hooks.
    """

    def __init__(
        self,
        model: nn.Module,
        original: nn.Module | None,
        architecture: Architecture,
        batches: list[torch.Tensor],
        outside: Iterable[str],
        sample: torch.Tensor | None = None,
        spill: Spill | None = None,
        ranks: Ranks = ALONE,
        disk: OnDisk | None = None,
    ) -> None:
        self._device = batches[0].device
        self._disk = disk if self._device.type == "cpu" else None  # what is elsewhere takes no memory of the process
        self.models = [model] if original is None else [model, original]
        self._architecture = architecture
        self._blocks = set(architecture.blocks)
        self._stops = self._blocks | set(outside)
        self._twin_stops = set(self._stops)
        self._ranks = ranks
        # Fewer batches than ranks are nobody's to observe: they only show the way, to each.
        share = ranks.share(len(batches)) if len(batches) >= ranks.size else range(len(batches))
        self._forwards = [Forward(model, batches[index], self._stops) for index in share]
        compared, held_out = _comparison(len(batches))
        self._held_out = {own for own, index in enumerate(share) if index in held_out}
        self._twins: dict[int, Forward] = {}
        if original is not None:
            own = {own: index for own, index in enumerate(share) if index in compared}
            self._twins = {own: Forward(original, batches[index], self._twin_stops) for own, index in own.items()}
        self._spill = spill or Spill(Path(), None)
        for forward in (*self._forwards, *self._twins.values()):
            self._spill.watch(forward)
        self._open: dict[str, _Group] = {}
        self._last: _Group | None = None
        self._width = 0
        # It stops before a head, too: running one takes time and memory, and shows nothing.
        ahead = self._blocks | set(architecture.outside)
        self._scout = Forward(model, batches[0][:1, :_SCOUT_TOKENS], ahead)
        self._sample = None if sample is None else Forward(model, sample, ahead)
        self._divisors: Mapping[str, torch.Tensor] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> Calibration:
        """Start: every batch, and the scout, runs up to the first block."""
        for model in self.models:
            self._hooks.enter_context(watched(model, [*self._architecture.blocks, *self._architecture.all_layers]))
        self._advance(range(len(self._forwards)))
        self._scout.advance()
        if self._sample is not None:
            self._sample.advance()
        return self

    def __exit__(self, *_: object) -> None:
        for forward in [self._scout, self._sample, *self._forwards, *self._twins.values()]:
            if forward is not None:
                forward.cancel()
        self._spill.close()
        self._hooks.close()

    def standing_before(self) -> str | None:
        """The block or layer before which the batches stand; None when they are through."""
        return self._forwards[0].at

    def look_ahead(self) -> Ahead:
        """Send the sample through the block before which the batches stand, while its weights are the original ones."""
        assert self._sample is not None
        self._follow(self._scout)
        self._follow(self._sample)
        log: list[tuple[str, torch.Tensor, int]] = []
        self._sample.log = log
        self._sample.advance()
        self._sample.log = None
        inputs: dict[str, list[torch.Tensor]] = {}
        for name, x, version in log:
            if x._version == version:  # else somebody wrote into it since
                inputs.setdefault(name, []).append(x.reshape(-1, x.shape[-1]))
        return Ahead(self._scout.call, {name: torch.cat(parts) for name, parts in inputs.items()})

    def pass_through(self) -> None:
        """Run every batch through the block before which it stands, without observing anything."""
        self._scout_ahead()
        self._advance(range(len(self._forwards)))

    def observe(
        self, layers: list[PlannedLayer], *, last: bool, divisors: Mapping[str, torch.Tensor] | None = None
    ) -> Iterator[tuple[list[PlannedLayer], InputStatistics]]:
        """Run every batch through the block, stopping at ``layers``.

        Yields groups of layers that share an input, with its statistics. While a group is handed out the batches stand
        before it: the caller replaces the weights, and the batches go on through the new ones. Layers that no batch
        reached come at the end, with no tokens.

        Args:
            layers: of the block before which the batches stand, in the order of definition.
            last: nothing after these layers will be observed: the batches need not go on behind them.
            divisors: of layers whose inputs were rescaled, ``[in]``: what their inputs in the original model are to be
                divided by before the two are compared.
        """
        self._divisors = divisors or {}
        groups = [_Group([layer], self._device, self._disk) for layer in layers]
        if self.standing_before() in self._blocks:
            groups = self._group(layers)
        self._open = {layer.name: group for group in groups for layer in group.layers}
        self._last = groups[-1] if groups and last else None
        if self.standing_before() in self._blocks:
            first = self._forwards[0].input
            self._width = first.shape[-1] if first is not None else 0
            self._stops.update(self._open)
            self._twin_stops.update(self._open.keys() - self._architecture.routed)
            self._advance(range(len(self._forwards)))
        else:
            self._take_in(range(len(self._forwards)))
        while groups:
            # All stand before the same group, except where batches without tokens for an expert have skipped it: those
            # wait behind the experts until the others have arrived.
            standing = {self._open.get(forward.at or "") for forward in self._forwards}
            somewhere = self._ranks.any([group in standing for group in groups])
            reached = [group for group, there in zip(groups, somewhere, strict=True) if there]
            group = min(reached, key=lambda group: group.names.isdisjoint(self._architecture.routed), default=None)
            if group is None:
                break
            groups.remove(group)
            yield group.layers, group.finish(self._ranks)
            arrived = [index for index, forward in enumerate(self._forwards) if forward.at in group.names]
            self._stops -= group.names
            self._twin_stops -= group.names
            if groups or not last:
                self._advance(arrived)
        for group in groups:
            yield group.layers, InputStatistics(tokens=0)

    def _group(self, layers: list[PlannedLayer]) -> list[_Group]:
        """Cut layers into groups with one input; the scout, ahead of the others in the block, sees which."""
        self._scout.log = []
        self._scout_ahead()
        group_of = {name: group for group in shared_inputs(self._scout.log) for name in group}
        self._scout.log = None
        groups: dict[str, _Group] = {}
        for layer in layers:
            # Experts see tokens of their own, even where a few tokens of a scout cannot show it.
            shared = layer.name in group_of and layer.name not in self._architecture.routed
            key = group_of[layer.name][0] if shared else layer.name
            groups.setdefault(key, _Group([], self._device, self._disk)).layers.append(layer)
        return list(groups.values())

    def _scout_ahead(self) -> None:
        """Send the scout through the block before which the batches stand."""
        self._follow(self._scout)
        self._scout.advance()

    def _follow(self, forward: Forward) -> None:
        """Let a forward come to where the batches stand."""
        while forward.at != self.standing_before() and not forward.dead:
            forward.advance()

    def _advance(self, indices: Iterable[int]) -> None:
        for index in indices:
            self._spill.wake(self._forwards[index])
            self._forwards[index].advance()
            self._take_in([index])

    def _take_in(self, indices: Iterable[int]) -> None:
        """Add the inputs before which batches have arrived to the statistics, and let their twins follow."""
        for index in indices:
            forward, twin = self._forwards[index], self._twins.get(index)
            self._spill.wake(forward)
            group = self._open.get(forward.at or "")
            if group is not None:
                group.add(forward.input)
            # Two models route tokens to experts differently, so there is no original input to compare an expert's with.
            comparable = forward.at is not None and forward.at not in self._architecture.routed
            if twin is not None and not twin.dead and comparable:
                self._spill.wake(twin)
                self._compare(forward, twin, group, held_out=index in self._held_out)
                self._spill.rest(twin)
            self._spill.rest(forward)

    def _compare(self, forward: Forward, twin: Forward, group: _Group | None, held_out: bool) -> None:
        """Let the twin follow a batch, and take in how its input differs where that is wanted."""
        while twin.at != forward.at and not twin.dead:
            twin.advance()
        if group is not None and Statistic.SHIFT in group.wanted:
            original, divisor = twin.input, self._divisors.get(forward.at or "")
            if divisor is not None and original is not None:
                original = original / divisor
            group.compare(forward.input, original, held_out)
            if group is self._last:
                twin.cancel()
            elif self._writes_residual(group):
                twin.advance()

    def _writes_residual(self, group: _Group) -> bool:
        """Whether a batch holds less behind these layers than before them, and may go there already.

        Layers whose outputs together are as wide as the residual stream write to it; what they were made from is then
        no longer needed.
        """
        return sum(layer.shape[0] for layer in group.layers) == self._width


def _comparison(batches: int) -> tuple[list[int], set[int]]:
    """Which of so many batches are compared with the original model, and which of these are held out.

    Without a batch to hold out nothing is compared: nothing could say how far to believe it.
    """
    compared = [index for index in range(batches) if batches == 2 or index % _NOT_COMPARED != _NOT_COMPARED - 1]
    if len(compared) < 2:
        return [], set()
    return compared, {index for index in compared if index % _HELD_OUT == _HELD_OUT - 2} or {compared[-1]}


@dataclass(eq=False)
class _Group:
    """Layers that share an input, and what is known of it so far."""

    layers: list[PlannedLayer]
    device: torch.device
    disk: OnDisk | None
    _accumulator: InputAccumulator | None = None

    @property
    def names(self) -> set[str]:
        return {layer.name for layer in self.layers}

    @property
    def wanted(self) -> Statistic:
        wanted = Statistic.NONE
        for layer in self.layers:
            wanted |= layer.needs
        return wanted

    def add(self, x: torch.Tensor | None) -> None:
        assert x is not None
        if self._accumulator is None:
            self._accumulator = self._nothing_yet()
        self._accumulator.add(x)

    def compare(self, x: torch.Tensor | None, original: torch.Tensor | None, held_out: bool) -> None:
        assert self._accumulator is not None
        assert x is not None
        assert original is not None
        self._accumulator.compare(x, original, held_out)

    def finish(self, ranks: Ranks) -> InputStatistics:
        accumulator, self._accumulator = self._accumulator, None
        if accumulator is None:  # no batch of this rank came here, but one of another's
            accumulator = self._nothing_yet()
        if ranks.size > 1:
            accumulator.join(ranks)
        return accumulator.finish()

    def _nothing_yet(self) -> InputAccumulator:
        return InputAccumulator(self.wanted, self.layers[0].shape[1], self.device, self.disk)
