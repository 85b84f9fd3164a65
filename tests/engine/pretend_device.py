"""A device that is not there: its tensors hold CPU tensors, and are kept apart from the CPU's as a GPU's are.

The engine runs on it with real numbers, and whatever would fail on a GPU because two devices meet fails here. What it
cannot show is how fast a GPU is, how its libraries round, and when its memory is full.

It goes by the name of torch's ``lazy`` device: no library claims that one, nothing is set up when it is named, and
backward passes run on the thread that asks for them, as they do on the CPU.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "lazy:0"
_DEVICE = torch.device(NAME)
_CPU = torch.device("cpu")

# Where a GPU takes tensors of the CPU, too: copies, and indices.
_MIXING = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_"}
# What takes time: work that was meant for the device and done on the CPU would be among these.
PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "addmv", "mv", "dot", "addr_", "addcmul"}
PRODUCTS |= {"linalg_cholesky_ex", "linalg_eigh", "_linalg_eigh", "linalg_qr", "linalg_solve_triangular"}


class PretendTensor(torch.Tensor):
    """A tensor on the pretended device; its numbers are in ``numbers``, on the CPU."""

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
        """Only reached when no :class:`PretendDevice` is in force, where there should be no such tensors."""
        raise RuntimeError(f"{operation} of a pretended device that is gone")

    def __getitem__(self, index: Any) -> Any:
        """As of any tensor; torch would put the numbers of a list where no mode sees them."""
        return super().__getitem__(_no_lists(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        """As of any tensor."""
        super().__setitem__(_no_lists(index), value)

    def __repr__(self, **_: Any) -> str:
        """Without its numbers, which would have to be fetched."""
        return f"PretendTensor({list(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        """Its numbers, fetched."""
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        """An address: good for nothing but to tell tensors apart."""
        return self.numbers.data_ptr()

    def untyped_storage(self) -> Any:
        """Its memory."""
        return PretendStorage(self.numbers.untyped_storage())


class PretendStorage:
    """Memory of the pretended device: what torch's storages of a GPU can do, as far as somebody asks for it."""

    device = _DEVICE

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._storage = storage

    def data_ptr(self) -> int:
        return self._storage.data_ptr()

    def nbytes(self) -> int:
        return self._storage.nbytes()

    def resizable(self) -> bool:
        return self._storage.resizable()

    def resize_(self, size: int) -> None:
        self._storage.resize_(size)

    def cpu(self) -> torch.UntypedStorage:
        return torch.UntypedStorage(self.nbytes()).copy_(self._storage)

    def copy_(self, source: torch.UntypedStorage) -> None:
        assert source.device == _CPU
        self._storage.copy_(source)


class PretendDevice(TorchDispatchMode):
    """While it is entered, ``lazy:0`` is a device.

    Attributes:
        cpu_work: by name, the largest operand (in elements) of each product that was computed on the CPU.
        device_work: the same of the device.
        to_cpu: bytes that went from the device to the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cpu_work: Counter[str] = Counter()
        self.device_work: Counter[str] = Counter()
        self.to_cpu = 0
        self._made: weakref.WeakSet[Any] = weakref.WeakSet()
        self._tensors: list[weakref.ref[PretendTensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on the numbers of its arguments, on one of the two devices."""
        kwargs = dict(kwargs or {})
        name = operation._schema.name.partition("::")[2]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        here = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
        there = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor) and tensor.ndim]
        there = [tensor for tensor in there if tensor.device == _CPU]
        if here and there and name not in _MIXING:
            raise RuntimeError(
                f"{operation}: expected all tensors on one device, found {[tuple(t.shape) for t in here]} on {NAME} and "
                f"{[tuple(t.shape) for t in there]} on the CPU"
            )
        if name.startswith("index") and name in _MIXING and there and isinstance(args[0], PretendTensor):
            assert all(t.dtype in (torch.int64, torch.bool, torch.uint8, torch.int32) for t in there), operation
        wanted = kwargs.get("device")
        on_device = bool(here) if wanted is None else wanted.type == _DEVICE.type
        if wanted is not None and on_device:
            kwargs["device"] = _CPU
            assert kwargs.get("generator") is None
        if name in PRODUCTS:
            work = self.device_work if here else self.cpu_work
            work[name] = max([work[name], *(tensor.numel() for tensor in tensors)])
        if name == "_to_copy" and here and not on_device:
            self.to_cpu += here[0].nbytes
        plain_args, plain_kwargs = tree_map(_numbers, (args, kwargs))
        out = operation(*plain_args, **plain_kwargs)
        if not (here or on_device):
            return out
        written = {id(_numbers(tensor)): tensor for tensor in here}  # what an operation writes to it also returns
        return tree_map(lambda leaf: self._wrapped(leaf, written, on_device), out)

    def _wrapped(self, leaf: Any, written: dict[int, Any], on_device: bool) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) in written:
            return written[id(leaf)]
        if not on_device:
            return leaf
        made = PretendTensor(leaf)
        self._tensors.append(weakref.ref(made))
        return made

    def alive(self) -> list[PretendTensor]:
        """The tensors that are on the device."""
        found = [reference() for reference in self._tensors]
        self._tensors = [reference for reference, tensor in zip(self._tensors, found, strict=True) if tensor is not None]
        return [tensor for tensor in found if tensor is not None]

    def bytes(self) -> int:
        """Of memory that tensors on the device take."""
        storages = [tensor.untyped_storage() for tensor in self.alive()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _numbers(leaf: Any) -> Any:
    return leaf.numbers if isinstance(leaf, PretendTensor) else leaf


def _no_lists(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(_no_lists, index))
    return torch.tensor(index, dtype=torch.int64) if isinstance(index, list) else index
