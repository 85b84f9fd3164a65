"""A device that is not there: its tensors hold CPU tensors, and are kept apart from the CPU's as a GPU's are.

The engine runs on it with real numbers, and what would fail on a GPU because two devices meet fails here. What it
cannot show is how fast a GPU is, how its libraries round, and what happens when its memory is full.

It goes by the name of torch's ``lazy`` device: no library claims that one, nothing is set up when it is named, and
backward passes run on the thread that asks for them, as they do on the CPU.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from typing import Any, Self
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "lazy:0"
_DEVICE = torch.device(NAME)
_CPU = torch.device("cpu")

# Where a GPU takes tensors of the CPU, too: copies, and indices.
_COPIES = {"copy_", "_to_copy"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# What takes time: work that was meant for the device and done on the CPU would be among these.
_PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "addmv", "mv", "dot", "addr_", "linalg_cholesky_ex"}
_PRODUCTS |= {"_linalg_eigh", "linalg_qr", "linalg_solve_triangular", "linear", "matmul", "einsum"}


class PretendTensor(torch.Tensor):
    """A tensor on the device; its numbers are in ``numbers``, on the CPU."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> PretendTensor:
        """Wrap a CPU tensor."""
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=_DEVICE,
        )
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Only reached where no :class:`PretendDevice` is entered: then there is no such device."""
        raise RuntimeError(f"{operation} on a device that is gone")

    def __getitem__(self, index: Any) -> Any:
        """As of any tensor; torch would make a tensor of a list where no mode sees it."""
        return super().__getitem__(_without_lists(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        """As of any tensor."""
        super().__setitem__(_without_lists(index), value)

    def __repr__(self, **_: Any) -> str:
        """Without the numbers, which would have to be fetched."""
        return f"PretendTensor({list(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        """The numbers, fetched."""
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        """An address, by which tensors can be told apart."""
        return self.numbers.data_ptr()

    def untyped_storage(self) -> Any:
        """The memory."""
        return PretendStorage(self.numbers.untyped_storage())


class PretendStorage:
    """Memory of the device: what torch's storages of a GPU can do, as far as somebody asks for it."""

    device = _DEVICE

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._storage = storage
        self.data_ptr = storage.data_ptr
        self.nbytes = storage.nbytes
        self.resizable = storage.resizable
        self.resize_ = storage.resize_

    def cpu(self) -> torch.UntypedStorage:
        """A copy on the CPU."""
        return torch.UntypedStorage(self.nbytes()).copy_(self._storage)

    def copy_(self, source: torch.UntypedStorage) -> None:
        """Take in a copy of memory of the CPU."""
        assert source.device == _CPU
        self._storage.copy_(source)


class PretendDevice(TorchDispatchMode):
    """While it is entered, there is such a device.

    Attributes:
        work: elements of the largest operand of a product on the device.
        work_on_cpu: the same of the CPU.
        peak: the most bytes that tensors on the device took.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work = self.work_on_cpu = self.peak = 0
        self._tensors: list[weakref.ref[PretendTensor]] = []
        self._count = 0
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Make the device known to what dispatch does not reach: constructors, generators, the threads of a loader."""
        with contextlib.ExitStack() as entered:
            entered.enter_context(patch.object(torch, "Generator", _Generator))
            entered.enter_context(patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}))
            entered.enter_context(_Constructors())
            self._entered = entered.pop_all()
        return super().__enter__()

    def __exit__(self, *reason: Any) -> None:
        """There is no such device any more."""
        super().__exit__(*reason)
        self._entered.close()

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on the numbers of its arguments, for one of the two devices."""
        kwargs = dict(kwargs or {})
        name = operation._schema.name.partition("::")[2]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        own = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
        if own:
            _check_apart(name, args, [tensor for tensor in tensors if tensor.device == _CPU and tensor.ndim])
        # In inference mode operations come as they were called: devices stand anywhere, and products have other names.
        wanted = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)), None)
        here = bool(own) if wanted is None else wanted.type == _DEVICE.type
        if name in _PRODUCTS:
            size = max(tensor.numel() for tensor in tensors)
            self.work, self.work_on_cpu = max(self.work, here * size), max(self.work_on_cpu, (not here) * size)
        plain_args, plain_kwargs = tree_map(_numbers, (args, kwargs))
        out = operation(*plain_args, **plain_kwargs)
        written = {id(_numbers(tensor)): tensor for tensor in own}  # what an operation writes to it also returns
        return tree_map(lambda leaf: written[id(leaf)] if id(leaf) in written else self._made(leaf, here), out)

    def _made(self, leaf: Any, here: bool) -> Any:
        if not here or not isinstance(leaf, torch.Tensor):
            return leaf
        made = PretendTensor(leaf)
        self._tensors.append(weakref.ref(made))
        self._count += 1
        if self._count % 64 == 0:
            self.peak = max(self.peak, self.held())
        return made

    def held(self) -> int:
        """Bytes that tensors on the device take now."""
        tensors = [tensor for reference in self._tensors if (tensor := reference()) is not None]
        self._tensors = [weakref.ref(tensor) for tensor in tensors]
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class _Constructors(TorchFunctionMode):
    """``torch.tensor``, which goes to its device where no dispatch mode sees it."""

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make it on the CPU first."""
        kwargs = kwargs or {}
        wanted = kwargs.get("device")
        if function is torch.tensor and wanted is not None and torch.device(wanted).type == _DEVICE.type:
            return function(*args, **{**kwargs, "device": _CPU}).to(_DEVICE)
        return function(*args, **kwargs)


class _Generator(torch.Generator):
    """Random numbers of the device are the CPU's."""

    def __new__(cls, device: Any = _CPU) -> Self:
        """One of the CPU."""
        return super().__new__(cls, _CPU)


def _check_apart(name: str, args: Any, strangers: list[torch.Tensor]) -> None:
    """Raise where the device meets tensors of the CPU, but for what a GPU takes."""
    indexed = name in _INDEXING and isinstance(args[0], PretendTensor)
    if indexed and len(args) > 2 and isinstance(args[2], torch.Tensor):  # what is put there
        indexed = isinstance(args[2], PretendTensor) or not args[2].ndim
    if strangers and not indexed and name not in _COPIES:
        shapes = [tuple(tensor.shape) for tensor in strangers]
        raise RuntimeError(f"{name}: expected all tensors to be on {NAME}, and {shapes} are on the CPU")


def _numbers(leaf: Any) -> Any:
    if isinstance(leaf, torch.device) and leaf.type == _DEVICE.type:
        return _CPU
    return leaf.numbers if isinstance(leaf, PretendTensor) else leaf


def _without_lists(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(_without_lists, index))
    return torch.tensor(index, dtype=torch.int64) if isinstance(index, list) else index
