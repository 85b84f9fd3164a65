"""Several processes, on one machine or many, that make one result: as torchrun and accelerate launch start them.

Each rank runs its share of the calibration batches through the same model; sums over tokens are sums over ranks; the
rows of a layer are solved in parts, blocks that no token runs through one a rank; and rank 0 writes. Every rank has the
same weights after every solve, so all see what one process would see. A run by itself is one rank, for which all this
is nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from quantlab.engine.journal import Journal
from quantlab.engine.report import LayerReport
from quantlab.errors import LostRankError, PreflightError, QuantlabError
from quantlab.numerics import QTensor
from quantlab.storage import Storage

Value = TypeVar("Value")

# Seconds for which a rank that says nothing is waited for: the longest that one of them may solve a layer alone.
TIMEOUT = "QUANTLAB_TIMEOUT"
_SECONDS = 1800


class Ranks:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: which one this is, from 0.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None, seconds: float = _SECONDS) -> None:
        self.rank, self.size = rank, size
        self._group, self._seconds = group, seconds

    @property
    def writes(self) -> bool:
        """Whether this is the rank that writes the result and talks to people."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of ``count`` things are this rank's."""
        return range(self.rank, count, self.size)

    def rows(self, count: int) -> slice:
        """Which of ``count`` rows are this rank's, one after the other."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, tensor: torch.Tensor) -> None:
        """Add up all ranks' tensors, in place; every rank gets the same bits."""
        self._reduce(tensor, distributed.ReduceOp.SUM)

    def maximum(self, tensor: torch.Tensor) -> None:
        """The largest of all ranks' entries, in place."""
        self._reduce(tensor, distributed.ReduceOp.MAX)

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether it is set on any rank."""
        together = torch.tensor(list(map(int, flags)), dtype=torch.int32)
        self.maximum(together)
        return [bool(flag) for flag in together]

    def broadcast(self, value: Value, owner: int = 0) -> Value:
        """The owner's value, on every rank."""
        box: list[Any] = [value if self.rank == owner else None]
        if self.size > 1:
            self._together(lambda: distributed.broadcast_object_list(box, owner, group=self._group))
        return box[0]

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value, on every rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            self._together(lambda: distributed.all_gather_object(values, value, group=self._group))
        return values

    def to_writer(self, value: Value | None, owner: int) -> Value | None:
        """The owner's value on the rank that writes; elsewhere, None."""
        if owner == 0 or self.rank not in (0, owner):
            return value if self.writes else None
        box: list[Any] = [value]
        if self.writes:
            self._together(lambda: distributed.recv_object_list(box, owner, group=self._group))
            return box[0]
        self._together(lambda: distributed.send_object_list(box, 0, group=self._group))
        return None

    def agreed(self, work: Callable[[], Value], owner: int = 0) -> Value:
        """What the work gives on the owner, on every rank; an error of ours there is everybody's.

        Raises:
            QuantlabError: the owner's.
        """
        outcome: Any = None
        if self.rank == owner:
            try:
                outcome = work()
            except QuantlabError as error:
                outcome = error
        outcome = self.broadcast(outcome, owner)
        if isinstance(outcome, QuantlabError):
            raise outcome
        return outcome

    def _reduce(self, tensor: torch.Tensor, operation: Any) -> None:
        if self.size > 1:
            group = self._group if tensor.device.type == "cpu" else None  # the default one has NCCL
            self._together(lambda: distributed.all_reduce(tensor, operation, group=group))

    def _together(self, call: Callable[[], object]) -> None:
        try:
            call()
        except (RuntimeError, ValueError, EOFError) as error:
            raise LostRankError(
                f"process {self.rank} of {self.size} lost another one: it has ended, or did not answer within "
                f"{self._seconds:.0f} s ({TIMEOUT} sets this time); what was done is kept: start the run again, with "
                "as many processes as you like, and it goes on"
            ) from error


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that this one was started with, by the environment that launchers set; one by itself is alone.

    Raises:
        PreflightError: the environment is not whole, or the others do not come.
    """
    started = distributed.is_available() and distributed.is_initialized()
    if not started and int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield ALONE
        return
    seconds = float(os.environ.get(TIMEOUT, _SECONDS))
    timeout = timedelta(seconds=seconds)
    try:
        if not started:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(backend, timeout=timeout)
        group = distributed.new_group(backend="gloo", timeout=timeout)
    except (RuntimeError, ValueError, KeyError) as error:
        raise PreflightError(
            f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')}, but the processes of the run do not find each other "
            f"({' '.join(str(error).split())[:200]}); start them with torchrun or accelerate launch, or unset it"
        ) from error
    # It stays for the next run of these processes: to part and to meet again at the same address is a race.
    yield Ranks(distributed.get_rank(), distributed.get_world_size(), group, seconds)


class SharedJournal:
    """The journal of a run of several processes: rank 0 has it, the others know what is in it.

    Its methods are those of :class:`Journal`, and all ranks call them together.
    """

    def __init__(self, ranks: Ranks, out: Path, begin: Callable[[], Journal]) -> None:
        """Let rank 0 begin, or go on.

        Raises:
            PreflightError: it could not.
        """
        self._ranks = ranks
        self._journal: Journal | None = None

        def open_journal() -> tuple[str, ...]:
            self._journal = begin()
            return self._journal.resumed

        self.resumed = ranks.agreed(open_journal)
        self._done = list(self.resumed)
        # Where states may wait: another machine need not have the folder of the result.
        beside = out.parent if out.parent.is_dir() else Path(tempfile.gettempdir())
        self.folder = self._journal.folder if self._journal is not None else beside

    @property
    def reports(self) -> list[LayerReport]:
        """Of all layers of finished blocks."""
        return self._ranks.broadcast(self._journal.reports if self._journal is not None else [])

    def done(self, block: str) -> bool:
        """Whether the block is finished."""
        return block in self._done

    def read(self, block: str) -> tuple[dict[str, QTensor], dict[str, torch.Tensor]]:
        """See :meth:`Journal.read`."""
        journal = self._journal
        return self._ranks.agreed(lambda: journal.read(block) if journal is not None else ({}, {}))

    def commit(
        self,
        block: str,
        tensors: dict[str, torch.Tensor],
        reports: Sequence[LayerReport],
        storages: dict[str, Storage],
    ) -> None:
        """See :meth:`Journal.commit`."""
        if self._journal is not None:
            self._journal.commit(block, tensors, reports, storages)
        self._done.append(block)

    def abandon(self) -> None:
        """See :meth:`Journal.abandon`."""
        if self._journal is not None:
            self._journal.abandon()

    def finish(self, complete: Callable[[Journal], None]) -> None:
        """Let rank 0 complete the result, and wait until it has."""
        journal = self._journal
        self._ranks.agreed(lambda: complete(journal) if journal is not None else None)
