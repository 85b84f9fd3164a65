"""The states of suspended forwards, and statistics, put away where they are more than the memory that they may take.

What a device has no room for waits in the memory of the process, and what that has no room for on the disk.

A suspended forward holds tensors in its own frames: the residual stream, a layer's input, masks, gates, whatever the
model's code still needs. Nobody has to know which: all tensors that it made are remembered weakly, and those that are
still there when it stops are its state. What is moved is their memory, under the same tensor objects, so the model's
code finds on its return what it left, to the bit.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quantlab.engine.forward import Forward
from quantlab.errors import CheckpointError

_FLOAT = 4


class Made(TorchDispatchMode):
    """While it is entered it remembers every tensor that is made, as long as somebody else does."""

    def __init__(self) -> None:
        super().__init__()
        self._tensors: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and remember what it returned."""
        out = function(*args, **(kwargs or {}))
        self._tensors += [weakref.ref(leaf) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        return out

    def alive(self) -> Iterator[torch.Tensor]:
        """Those of the tensors that are still there."""
        pairs = [(reference, reference()) for reference in self._tensors]
        self._tensors = [reference for reference, tensor in pairs if tensor is not None]
        yield from (tensor for _, tensor in pairs if tensor is not None)


@dataclass(eq=False)
class _State:
    """What is known of one forward's state.

    Attributes:
        made: its tensors.
        held: bytes that are where they were made.
        copied: bytes of what a device had no room for, in memory.
        copies: they themselves, in the order of ``away``; none while they are on disk.
        offset: where it is on disk.
        capacity: bytes that are its own there.
        away: the storages that are empty now, and how large they were.
    """

    made: Made
    held: int = 0
    copied: int = 0
    copies: list[torch.UntypedStorage] = field(default_factory=list)
    offset: int = 0
    capacity: int = 0
    away: list[tuple[torch.UntypedStorage, int]] = field(default_factory=list)


class Spill:
    """Puts the states of suspended forwards away where they are more than a budget; see the module.

    Args:
        folder: on the disk to use; the file there has no name, and is gone with the process.
        budget: bytes of states that may stay in memory; None if all may.
        on_device: bytes of states that may stay on the device where they are made, if that is not the CPU; None if all
            may.
    """

    def __init__(self, folder: Path, budget: int | None, on_device: int | None = None) -> None:
        self.budget = budget
        self.on_device = on_device
        self._folder = folder
        self._file: Any = None
        self._end = 0
        self._states: dict[Forward, _State] = {}

    def watch(self, forward: Forward) -> None:
        """Take over the care of a forward that has not begun."""
        if self._room(forward) is not None:
            state = self._states[forward] = _State(Made())
            forward.watched_by = state.made

    def rest(self, forward: Forward) -> None:
        """The forward is suspended: put its state away if there is no room for it.

        Raises:
            CheckpointError: the disk is full.
        """
        state = self._states.get(forward)
        if state is None or state.away:
            return
        storages = _own_storages(forward, state.made)
        size = sum(storage.nbytes() for storage in storages)
        held = sum(other.held for other in self._states.values()) - state.held
        if _fits(held + size, self._room(forward)):
            state.held = size
            return
        copied = sum(other.copied for other in self._states.values())
        if forward.batch.device.type == "cpu":
            self._write(state, size, storages)
        elif _fits(copied + size, self.budget):
            state.copies, state.copied = [storage.cpu() for storage in storages], size
        else:
            self._write(state, size, (storage.cpu() for storage in storages))
        state.held, state.away = 0, [(storage, storage.nbytes()) for storage in storages]
        for storage in storages:
            storage.resize_(0)

    def wake(self, forward: Forward) -> None:
        """The forward is about to go on, or to be looked at: bring back what was put away."""
        state = self._states.get(forward)
        if state is None:
            return
        at = state.offset
        for index, (storage, size) in enumerate(state.away):
            storage.resize_(size)
            if state.copies:
                storage.copy_(state.copies[index])
            elif storage.device.type == "cpu":
                self._move(os.preadv, storage, at)
            else:
                read = torch.UntypedStorage(size)
                self._move(os.preadv, read, at)
                storage.copy_(read)
            at += size
        state.held += sum(size for _, size in state.away)
        state.away, state.copies, state.copied = [], [], 0

    def close(self) -> None:
        """Forget all states."""
        self._states.clear()
        if self._file is not None:
            self._file.close()

    def _room(self, forward: Forward) -> int | None:
        """Bytes for states where the forward runs."""
        return self.budget if forward.batch.device.type == "cpu" else self.on_device

    def _write(self, state: _State, size: int, storages: Iterable[torch.UntypedStorage]) -> None:
        """Put what a state holds on disk: so many bytes together."""
        if size > state.capacity:
            state.offset, state.capacity = self._end, size
            self._end += size
        try:
            at = state.offset
            for storage in storages:
                self._move(os.pwrite, storage, at)
                at += storage.nbytes()
        except OSError as error:
            raise CheckpointError(
                f"{self._folder}: the states of the calibration batches do not fit there ({error.strerror}); free some "
                "space, give more --memory, or use fewer calibration samples"
            ) from error

    def _move(self, move: Any, storage: torch.UntypedStorage, at: int) -> None:
        """Read or write a storage at a place of the file."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed by close()
        _transfer(move, self._file, storage.data_ptr(), storage.nbytes(), at)


class DiskMatrix:
    """A float32 matrix on the disk, of zeros to begin with, read and written some rows at a time.

    Its file has no name, and is gone with the object.

    Args:
        folder: on the disk to use.
        shape: of the matrix.
    """

    def __init__(self, folder: Path, shape: tuple[int, int]) -> None:
        self.shape = torch.Size(shape)
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed when nobody has it any more
        os.ftruncate(self._file.fileno(), self.shape.numel() * _FLOAT)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """A copy of some rows that lie together."""
        start, stop, _ = rows.indices(self.shape[0])
        values = torch.empty(stop - start, self.shape[1])
        self._move(os.preadv, values, start)
        return values

    def __setitem__(self, rows: slice, values: torch.Tensor) -> None:
        """Replace rows that lie together.

        Raises:
            CheckpointError: the disk is full.
        """
        start, stop, _ = rows.indices(self.shape[0])
        if values.shape != (stop - start, self.shape[1]):
            raise ValueError(f"rows {start} to {stop} of {tuple(self.shape)}: {tuple(values.shape)} numbers")
        try:
            self._move(os.pwrite, values.float().contiguous(), start)
        except OSError as error:
            raise CheckpointError(
                f"{self._folder}: the statistics of a layer do not fit there ({error.strerror}); free some space, or "
                "give more --memory"
            ) from error

    def _move(self, move: Any, values: torch.Tensor, row: int) -> None:
        _transfer(move, self._file, values.data_ptr(), values.nbytes, row * self.shape[1] * _FLOAT)


def _transfer(move: Any, file: Any, address: int, size: int, at: int) -> None:
    """Read or write some memory at a place of a file."""
    # A view of a tensor by way of numpy would forbid for ever that its storage is resized.
    memory = memoryview((ctypes.c_char * size).from_address(address))
    done = 0
    while done < size:
        rest: Any = memory[done:] if move is os.pwrite else [memory[done:]]
        count = move(file.fileno(), rest, at + done)
        if count == 0:
            raise OSError(0, "its file ends early")
        done += count


def _fits(size: int, budget: int | None) -> bool:
    return budget is None or size <= budget


def _own_storages(forward: Forward, made: Made) -> list[torch.UntypedStorage]:
    """The memory that a forward holds where it runs, and nobody else does.

    Weights and buffers are the model's own, and the batch is its twin's, too.
    """
    others = (forward.batch, *forward.model.parameters(), *forward.model.buffers())
    shared = {tensor.untyped_storage().data_ptr() for tensor in others}
    own: dict[int, torch.UntypedStorage] = {}
    for tensor in made.alive():
        if tensor.device.type == forward.batch.device.type:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.resizable() and storage.data_ptr() not in shared:
                own[storage.data_ptr()] = storage
    return list(own.values())
