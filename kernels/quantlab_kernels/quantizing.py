"""Making a quantized weight, compiled: what are many passes over it in torch's own operations is one over each row.

Every function answers None where there is no kernel for what it is given (another device, another processor); the
caller then does the same in torch. Weights are ``[rows, groups, size]`` in any dtype that activations have, and are not
copied.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from quantlab_kernels import native

_PLAIN = (torch.Tensor, torch.nn.Parameter)


class _Groups(ctypes.Structure):
    """``ql_groups`` of quantlab_cpu.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("rows", "groups", "size", "scale_rows")),
        ("type", ctypes.c_int32),
    )


class _Grid(ctypes.Structure):
    """``ql_grid`` of quantlab_cpu.h."""

    _fields_ = (("values", ctypes.c_void_p), ("borders", ctypes.c_void_p), ("count", ctypes.c_int32))


class _SearchSteps(ctypes.Structure):
    """``ql_search_steps`` of quantlab_cpu.h."""

    _fields_ = (
        ("importance", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("refits", ctypes.c_int32),
    )


def group_peaks(weight: torch.Tensor) -> torch.Tensor | None:
    """The element of largest magnitude of each group, of several the first, signed: float32 ``[rows, groups]``."""
    if not _has_kernel(weight):
        return None
    call = _Call(weight)
    peaks = torch.empty(weight.shape[:2])
    return peaks if call("ql_peaks", call.groups(), peaks) else None


def search_scales(
    weight: torch.Tensor,
    start: torch.Tensor,
    values: torch.Tensor,
    borders: torch.Tensor | None,
    importance: torch.Tensor | None,
    factors: Sequence[float],
    refits: int,
) -> torch.Tensor | None:
    """The scales that leave the smallest squared error of those tried, each fitted to its codes by least squares.

    Args:
        weight: ``[rows, groups, size]``.
        start: float32 ``[rows, groups]``, the scales that the search starts with; 0 stays.
        values: float32 ``[2..256]``, ascending: what codes mean.
        borders: float32, one fewer: what lies above border i has a code above i. None: the values are consecutive
            integers, and what lies between two goes to the even one.
        importance: float32 ``[groups * size]``, what the squared error of an input counts; None: all alike.
        factors: of the inverse of ``start``, tried in this order.
        refits: how often to go on from the best afterwards.

    Returns:
        float32 ``[rows, groups]``.
    """
    if not _has_kernel(weight):
        return None
    call = _Call(weight)
    steps = _SearchSteps(call.floats(importance), call.floats(torch.tensor(factors)), len(factors), refits)
    found = torch.empty(weight.shape[:2])
    operands = call.groups(start), call.grid(values, borders), ctypes.byref(steps)
    return found if call("ql_search", *operands, found) else None


def nearest_codes(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    values: torch.Tensor,
    borders: torch.Tensor | None,
) -> torch.Tensor | None:
    """Codes uint8 ``[rows, groups, size]`` of the values nearest to ``weight / scale + zero``; 0 for what is no number.

    Args:
        weight: ``[rows, groups, size]``.
        scales: float32 ``[rows, groups]`` or ``[1, groups]``.
        zeros: like ``scales`` in any dtype, or None.
        values: see :func:`search_scales`.
        borders: see :func:`search_scales`.
    """
    if not _has_kernel(weight):
        return None
    call = _Call(weight)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    return codes if call("ql_nearest", call.groups(scales, zeros), call.grid(values, borders), codes) else None


def row_errors(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    values: torch.Tensor,
    importance: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Squared error and energy of each row: the sums of ``(w - (value - zero) * scale)^2`` and of ``w^2``.

    Args:
        weight: ``[rows, groups, size]``.
        codes: uint8, of the same number of elements.
        scales: see :func:`nearest_codes`.
        zeros: see :func:`nearest_codes`.
        values: float32 ``[2..256]``, what codes mean.
        importance: float32 ``[groups * size]``, what the square of an input counts; None: all alike.

    Returns:
        Two float32 ``[rows]``.
    """
    if not _has_kernel(weight):
        return None
    call = _Call(weight)
    errors, energies = torch.empty(2, len(weight))
    # Codes are looked up, not found: any borders will do.
    operands = call.groups(scales, zeros), call.grid(values, values[1:]), call.floats(importance), call.kept(codes)
    return (errors, energies) if call("ql_errors", *operands, errors, energies) else None


def packed(codes: torch.Tensor, bits: int, width: int) -> torch.Tensor | None:
    """Codes uint8 ``[..., columns]``, none of more bits, as dense little-endian bit streams uint8 ``[..., width]``."""
    if not _has_kernel(codes, (torch.uint8,)):
        return None
    codes, columns = codes.contiguous(), codes.shape[-1]
    out = torch.empty(*codes.shape[:-1], width, dtype=torch.uint8)
    arguments = codes.data_ptr(), codes.numel() // columns, columns, bits, out.data_ptr(), torch.get_num_threads()
    return None if _library().ql_pack(*arguments) else out


def _has_kernel(tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...] = native.ACTIVATIONS) -> bool:
    plain = type(tensor) in _PLAIN and tensor.device.type == "cpu" and tensor.dtype in dtypes
    return plain and tensor.numel() > 0 and native.library() is not None


class _Call:
    """One call: C knows addresses only, so what they are of is kept here."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight.detach().contiguous()
        self._kept: list[torch.Tensor] = []

    def kept(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()

    def floats(self, tensor: torch.Tensor | None) -> int | None:
        return None if tensor is None else self.kept(tensor.float())

    def groups(self, scales: torch.Tensor | None = None, zeros: torch.Tensor | None = None) -> Any:
        weight = self._weight
        scale_rows = 0 if scales is None else len(scales)
        addresses = weight.data_ptr(), self.floats(scales), self.floats(zeros)
        return ctypes.byref(_Groups(*addresses, *weight.shape, scale_rows, native.TYPES[weight.dtype]))

    def grid(self, values: torch.Tensor, borders: torch.Tensor | None) -> Any:
        return ctypes.byref(_Grid(self.floats(values), self.floats(borders), values.numel()))

    def __call__(self, function: str, *operands: Any) -> bool:
        """Whether the kernel ran; tensors among the operands are what it writes."""
        plain = (operand.data_ptr() if isinstance(operand, torch.Tensor) else operand for operand in operands)
        return not getattr(_library(), function)(*plain, torch.get_num_threads())


@cache
def _library() -> ctypes.CDLL:
    found = native.library()
    if found is None:
        raise RuntimeError("the CPU kernels were not compiled")
    groups, grid, pointer = ctypes.POINTER(_Groups), ctypes.POINTER(_Grid), ctypes.c_void_p
    long, integer = ctypes.c_int64, ctypes.c_int
    found.ql_peaks.argtypes = [groups, pointer, integer]
    found.ql_search.argtypes = [groups, grid, ctypes.POINTER(_SearchSteps), pointer, integer]
    found.ql_nearest.argtypes = [groups, grid, pointer, integer]
    found.ql_errors.argtypes = [groups, grid, *[pointer] * 4, integer]
    found.ql_pack.argtypes = [pointer, long, long, integer, pointer, integer]
    return found
