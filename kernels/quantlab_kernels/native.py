"""The compiled CPU library: where it is, what it can do, and its functions on tensors.

Two parts. The kernels (``csrc/linear.cpp`` and its like) have a plain C interface and are built when the package is
installed. ``csrc/torch_op.cpp`` registers them with torch without Python in between; it depends on torch's headers, so
it is built when it is first needed, once for each version of torch, into a cache. Where there is no compiler the first
part is called through ctypes, and where there is no first part :mod:`quantlab_kernels.reference` does the work.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from copy import copy
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

ISAS = ("scalar", "avx2", "avx512")  # from the slowest on; all of them round results only
INT8 = "avx512-int8"  # rounds activations to 8 bits, too: only where it is asked for
_NUMBERED = (*ISAS, INT8)
TYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.int8: 3,
    torch.float8_e8m0fnu: 4,
}
ACTIVATIONS = (torch.float32, torch.float16, torch.bfloat16)
SCALES = (*ACTIVATIONS, torch.float8_e8m0fnu)
LINEARS_IN_C = (
    "AOTITorchError aoti_torch_cpu_linears(AtenTensorHandle x, const AtenTensorHandle *codes, int64_t codes_count, "
    "const AtenTensorHandle *scales, int64_t scales_count, const AtenTensorHandle *zeros, int64_t zeros_count, "
    "const AtenTensorHandle *tables, int64_t tables_count, int64_t bits, const AtenTensorHandle *biases, "
    "int64_t biases_count, AtenTensorHandle *result)"
)
_HERE = Path(__file__).parent
_LOG = logging.getLogger(__name__)


class _Weight(ctypes.Structure):
    """``ql_weight`` of quantlab_cpu.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "table", "bias", "left", "right")),
        *((name, ctypes.c_int64) for name in ("outputs", "columns", "groups", "scale_rows", "rank")),
        *((name, ctypes.c_int32) for name in ("bits", "table_size", "scale_type", "zero_type")),
        *((name, ctypes.c_int32) for name in ("bias_type", "left_type", "right_type")),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they were not built or cannot be loaded."""
    for suffix in EXTENSION_SUFFIXES:
        path = _HERE / f"_cpu{suffix}"
        if path.exists():
            try:
                return _declared(ctypes.CDLL(str(path)))
            except (OSError, AttributeError) as error:
                _LOG.warning("the compiled kernels are not used: %s", error)
    return None


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    weight, pointer, long = ctypes.POINTER(_Weight), ctypes.c_void_p, ctypes.c_int64
    found.ql_choose.argtypes = [weight, ctypes.c_int, long, ctypes.c_int]
    found.ql_linear.argtypes = [weight, ctypes.c_int, pointer, pointer, long, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    for function in (found.ql_few_rows, found.ql_most_rows):
        function.argtypes, function.restype = [weight, ctypes.c_int, ctypes.c_int], long
    found.ql_decode.argtypes = [weight, pointer, long, long, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    found.ql_round_rows.argtypes = [pointer, ctypes.c_int, long, long, pointer, pointer, ctypes.c_int]
    return found


def best_isa() -> str | None:
    """The best of :data:`ISAS` that this machine has, or None without compiled kernels."""
    found = library()
    return None if found is None else ISAS[found.ql_best_isa()]


class Weight:
    """One quantized weight as the compiled kernels see it: its tensors, contiguous, the table in float32.

    Args:
        at_most: an instruction set that is not to be exceeded; :data:`INT8` is above the others.

    Raises:
        ValueError: a tensor is not on the CPU, or of a dtype that there is no kernel for.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        table: torch.Tensor,
        bits: int,
        columns: int,
        bias: torch.Tensor | None = None,
        low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
        at_most: str = ISAS[-1],
    ) -> None:
        left, right = low_rank or (None, None)
        found = library()
        if found is None:
            raise ValueError("the CPU kernels were not compiled")
        self._library, self._at_most, self.columns = found, _NUMBERED.index(at_most), columns
        given = {"codes": codes, "scales": scales, "zeros": zeros, "table": table.float()}
        given |= {"bias": bias, "left": left, "right": right}
        # Kept, because C knows addresses only.
        self._tensors = {name: None if tensor is None else tensor.contiguous() for name, tensor in given.items()}
        self._c = _Weight(
            **{name: _address(name, tensor) for name, tensor in self._tensors.items()},
            outputs=codes.shape[0],
            columns=columns,
            groups=scales.shape[1],
            scale_rows=scales.shape[0],
            rank=0 if left is None else left.shape[1],
            bits=bits,
            table_size=table.numel(),
            scale_type=_type("scales", scales),
            zero_type=_type("zeros", zeros),
            bias_type=_type("bias", bias),
            left_type=_type("left low-rank factor", left),
            right_type=_type("right low-rank factor", right),
        )

    def alone(self) -> Weight:
        """This weight without its bias and its low-rank term."""
        other = copy(self)
        other._c = _Weight.from_buffer_copy(self._c)
        other._c.bias = other._c.left = other._c.right = None
        other._c.rank = 0
        return other

    @property
    def outputs(self) -> int:
        """Rows of the weight."""
        return int(self._c.outputs)

    def isa(self, dtype: torch.dtype, rows: int = 1) -> str:
        """The instruction set that runs this weight with so many rows of ``dtype``."""
        return _NUMBERED[self._library.ql_choose(ctypes.byref(self._c), TYPES[dtype], rows, self._at_most)]

    def few_rows(self, dtype: torch.dtype) -> int:
        """Up to so many rows of ``dtype`` it is not rounded; for more, panels of it are decoded to ``dtype``."""
        return int(self._library.ql_few_rows(ctypes.byref(self._c), TYPES[dtype], self._at_most))

    def most_rows(self, dtype: torch.dtype) -> int:
        """Up to so many rows of ``dtype`` go to :meth:`multiply`; for more it pays to :meth:`decode` the weight."""
        return int(self._library.ql_most_rows(ctypes.byref(self._c), TYPES[dtype], self._at_most))

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """``[rows, columns]`` to ``[rows, outputs]``, with the bias and the low-rank term."""
        x = x.contiguous()
        y = torch.empty(x.shape[0], self.outputs, dtype=x.dtype)
        operands = (x.data_ptr(), y.data_ptr(), x.shape[0], TYPES[x.dtype])
        if self._library.ql_linear(ctypes.byref(self._c), 1, *operands, self._at_most, torch.get_num_threads()):
            raise MemoryError(f"no memory for a product of {list(x.shape)} with {self.outputs} outputs")
        return y

    def decode(self, begin: int, end: int, out: torch.Tensor) -> torch.Tensor:
        """The weights of some outputs, in the first rows of ``out [>= end - begin, columns]``."""
        if out.shape[1] != self.columns or out.shape[0] < end - begin or not out.is_contiguous():
            raise ValueError(f"decoded weights are [{end - begin}, {self.columns}], not {list(out.shape)}")
        at_most = min(self._at_most, ISAS.index("avx2"))
        isa = self._library.ql_choose(ctypes.byref(self._c), TYPES[out.dtype], 1, at_most)
        arguments = (out.data_ptr(), begin, end, TYPES[out.dtype], isa, torch.get_num_threads())
        self._library.ql_decode(ctypes.byref(self._c), *arguments)
        return out[: end - begin]


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``x [rows, columns]`` as int8 and float32 scales ``[rows]``, or None where there is no kernel for it."""
    found = library()
    if found is None or type(x) is not torch.Tensor or x.device.type != "cpu" or x.dtype not in ACTIVATIONS:
        return None
    x = x.contiguous()
    codes, scales = torch.empty_like(x, dtype=torch.int8), torch.empty(len(x))
    arguments = (x.data_ptr(), TYPES[x.dtype], *x.shape, codes.data_ptr(), scales.data_ptr(), torch.get_num_threads())
    return None if found.ql_round_rows(*arguments) else (codes, scales)


def _address(what: str, tensor: torch.Tensor | None) -> int | None:
    if tensor is None:
        return None
    if tensor.device.type != "cpu":
        raise ValueError(f"{what}: on {tensor.device}; these kernels take CPU tensors")
    return tensor.data_ptr()


def _type(what: str, tensor: torch.Tensor | None) -> int:
    if tensor is None:
        return 0
    if tensor.dtype not in TYPES:
        raise ValueError(f"{what}: no kernel takes {tensor.dtype}; use one of {', '.join(map(str, TYPES))}")
    return TYPES[tensor.dtype]


# -------------------------------------------------------------------------------------- the op that torch calls itself


def register() -> bool:
    """Register ``quantlab::linear`` for the CPU in C++, which :func:`configure` then tells what to run without Python.

    Returns:
        Whether it is registered. It is not without a compiler, or where ``QUANTLAB_NO_BUILD`` is set.
    """
    return library() is not None and _operator() is not None


def configure(allowed: bool, at_most: str = ISAS[-1]) -> None:
    """Let the C++ operator run what compiled kernels run best; it hands everything else to ``linear_any``."""
    found = library()
    operator = None if found is None else _operator()
    if found is None or operator is None:
        return
    address = [ctypes.cast(function, ctypes.c_void_p) for function in (found.ql_most_rows, found.ql_linear)]
    operator.ql_configure(*address, ctypes.c_int(_NUMBERED.index(at_most)), ctypes.c_int(allowed))


@cache
def _operator() -> ctypes.CDLL | None:
    source = next((p for p in (_HERE / "csrc", _HERE.parent / "csrc") if (p / "torch_op.cpp").exists()), None)
    compiler = next(filter(None, (shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++"))), None)
    if source is None or compiler is None or os.environ.get("QUANTLAB_NO_BUILD") or sys.platform != "linux":
        return None
    try:
        # Global, because compiled graphs call LINEARS_IN_C by its name.
        return ctypes.CDLL(str(_built(source, compiler)), mode=ctypes.RTLD_GLOBAL)
    except (OSError, subprocess.SubprocessError) as error:
        _LOG.warning("quantlab::linear is called through Python: %s", str(error).splitlines()[0])
        return None


def _built(source: Path, compiler: str) -> Path:
    """The operator's library, out of the cache or built into it."""
    texts = b"".join((source / name).read_bytes() for name in ("torch_op.cpp", "quantlab_cpu.h"))
    digest = hashlib.sha256(texts).hexdigest()[:12]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantlab" / "kernels"
    target = folder / f"torch_op-{torch.__version__}-{digest}.so"
    if target.exists():
        return target
    root = Path(torch.__file__).parent
    include = [source, root / "include", root / "include/torch/csrc/api/include"]
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # no home to write to: for this process alone
            folder = Path(tempfile.mkdtemp(prefix="quantlab-"))
            target = folder / target.name
        building = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder))) / target.name
        command = [compiler, "-O2", "-std=c++20", "-shared", "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        command += [f"-I{path}" for path in include]
        command += [str(source / "torch_op.cpp"), f"-L{root / 'lib'}", "-ltorch_cpu", "-o", str(building)]
        _LOG.info("building %s, once for this version of torch", target)
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise OSError(f"{compiler} failed: {done.stderr.strip()[:500]}")
        os.replace(building, target)  # whole or not at all, whoever else builds it
    return target


def describe() -> dict[str, Any]:
    """What there is on this machine, for reports."""
    return {"compiled": library() is not None, "isa": best_isa(), "threads": torch.get_num_threads()}
