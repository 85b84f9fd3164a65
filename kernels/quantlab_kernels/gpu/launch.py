"""What stays the same from call to call of a kernel, kept.

A product takes a GPU a few microseconds; its launch must not take the host hundreds.

Triton looks at every argument of every call to find out for which types and alignments a kernel has to be compiled.
Here a :class:`Launch` is made for one weight and one form of activations: after the first call nothing is left to find
out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.compiler import CompiledKernel


class Launch:
    """A kernel with its grid and its compile-time arguments.

    Whoever calls it several times promises arguments of the same dtypes and alignments, on the same device, and the
    same integers.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], constants: dict[str, Any], options: dict[str, Any] | None = None
    ) -> None:
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._constants = constants
        self._options = {"enable_fp_fusion": True} | (options or {})
        self._run: Callable[..., None] | None = None
        self._trailing: tuple[Any, ...] = ()

    def __call__(self, *arguments: Any) -> None:
        """Launch it with the arguments that are no ``tl.constexpr``, in their order."""
        if self._run is not None:
            self._run(*arguments, *self._trailing)
            return
        compiled = self._kernel[self._grid](*arguments, **self._constants, **self._options)
        if isinstance(compiled, CompiledKernel):  # the interpreter returns none
            self._trailing = tuple(self._constants[name] for name in self._kernel.arg_names[len(arguments) :])
            self._run = compiled[self._grid]
