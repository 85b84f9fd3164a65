"""What is kept of a layer's inputs while the calibration data passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from quantlab.engine.distributed import Ranks
from quantlab.problem import InputStatistics, Rows, Statistic, pieces

OnDisk = Callable[[tuple[int, int]], Rows]
"""Makes a matrix of zeros on the disk."""

# Tokens a product, and columns a panel, of the second moment: see `_add_product`.
_TOKENS = 512
_PANEL = 192
# Every second token is compared with the original model: its neighbours say much the same, and the products are full
# ones, where those of a second moment are half.
_COMPARED = 2


class InputAccumulator:
    """Sums over tokens of one layer's inputs, or of one input that several layers share.

    Args:
        wanted: what is kept; nothing else is computed.
        width: the layer's in_features.
        device: of the inputs.
        disk: where the shifts are to be, which are needed a few rows at a time; None: in memory.
    """

    def __init__(
        self, wanted: Statistic, width: int, device: torch.device | str = "cpu", disk: OnDisk | None = None
    ) -> None:
        self.tokens = 0
        self._disk = disk
        self._wanted = wanted
        self._moment = self._diagonal = self._sum = self._magnitude = None
        self._shift: Rows | None = None
        self._held_out: Rows | None = None
        self._compared = self._held_out_compared = 0
        if Statistic.SECOND_MOMENT in wanted:
            self._moment = torch.zeros(width, width, device=device)
        elif Statistic.DIAGONAL in wanted:
            self._diagonal = torch.zeros(width, device=device, dtype=torch.float64)
        if Statistic.SHIFT in wanted:
            self._shift, self._held_out = (
                torch.zeros(width, width, device=device) if disk is None else disk((width, width)) for _ in range(2)
            )
        if Statistic.MEAN in wanted:
            self._sum = torch.zeros(width, device=device, dtype=torch.float64)
        if Statistic.MAGNITUDE in wanted:
            self._magnitude = torch.zeros(width, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Take in inputs ``[sequences, length, in]`` or ``[tokens, in]``."""
        if self._magnitude is not None and x.numel():
            a_sequence = x.float().abs().mean(-2).reshape(-1, x.shape[-1])
            torch.maximum(self._magnitude, a_sequence.amax(0), out=self._magnitude)
        x = x.reshape(-1, x.shape[-1])
        self.tokens += len(x)
        if self._moment is not None:
            _add_product(self._moment, x, x)
        if self._diagonal is not None:
            self._diagonal += x.float().square().sum(0)
        if self._sum is not None:
            self._sum += x.float().sum(0)

    def compare(self, x: torch.Tensor, original: torch.Tensor, held_out: bool) -> None:
        """Take in the difference to the same tokens' inputs in the original model, both ``[..., in]``."""
        width = x.shape[-1]
        x, original = (each.reshape(-1, width)[::_COMPARED] for each in (x, original))
        assert self._shift is not None
        assert self._held_out is not None
        _add_products(self._held_out if held_out else self._shift, original - x, x)
        self._compared += len(x)
        self._held_out_compared += len(x) if held_out else 0

    def join(self, ranks: Ranks) -> None:
        """Take in what the accumulators of the other ranks have seen: afterwards all have the same.

        Sums of float32 numbers a batch, in float64, hardly ever depend on their order: a few vectors are worth it.
        """
        counts = torch.tensor([self.tokens, self._compared, self._held_out_compared])
        ranks.sum(counts)
        self.tokens, self._compared, self._held_out_compared = counts.tolist()
        for total in (self._moment, self._diagonal, self._sum):
            if total is not None:
                ranks.sum(total)
        for shift in (self._shift, self._held_out):
            if shift is None:
                continue
            for rows in pieces(shift):
                part = shift[rows]
                ranks.sum(part)
                shift[rows] = part
        if self._magnitude is not None:
            ranks.maximum(self._magnitude)

    def finish(self) -> InputStatistics:
        """The means over all tokens."""
        if self._moment is not None:
            _mirror(self._moment)  # only the lower triangle was summed
            self._diagonal = self._moment.div_(max(self.tokens, 1)).diagonal().clone()
        elif self._diagonal is not None:
            self._diagonal = (self._diagonal / max(self.tokens, 1)).float()
        mean = None if self._sum is None else (self._sum / max(self.tokens, 1)).float()
        known = InputStatistics(
            self.tokens, self._moment, self._diagonal, self._shift, mean=mean, magnitude=self._magnitude
        )
        if self._moment is not None and self._disk is not None:
            known = replace(known, spare=self._disk((len(self._moment), len(self._moment))))
        if self._shift is None or self._held_out is None or not self._compared:
            return known
        for rows in pieces(self._shift):
            self._shift[rows] = (self._shift[rows] + self._held_out[rows]) / self._compared
        if not 0 < self._held_out_compared < self._compared:
            return known
        for rows in pieces(self._held_out):
            self._held_out[rows] = self._held_out[rows] / self._held_out_compared
        return replace(known, held_out_shift=self._held_out, held_out=self._held_out_compared / self._compared)


def _mirror(matrix: torch.Tensor) -> None:
    """Make a matrix symmetric by its lower triangle, where it lies."""
    for rows in pieces(matrix):
        below = slice(rows.stop, None)
        matrix[rows, below] = matrix[below, rows].T
        own = matrix[rows, rows]
        own.copy_(own.tril() + own.tril(-1).T)


def _add_products(total: Rows, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a.T @ b``, some rows at a time."""
    for rows in pieces(total):
        part = total[rows]
        _add_product(part, a[:, rows], b)
        total[rows] = part


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a.T @ b``; of a symmetric product (``a is b``) only the lower triangle, panel by panel.

    Activations of 16 bits are multiplied as they are where the CPU can (twice as fast as float32): products are exact,
    sums inside a product are float32, and rounding its result to 16 bits is the only loss, of random sign and relative
    size 2^-9 a product of 512 tokens; the sum over products is float32 again. Everything else runs in float32.
    """
    native = a.device.type == "cpu" and a.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    width = total.shape[1]
    panel = _PANEL if a is b else width
    for start in range(0, len(a), _TOKENS if native else 8 * _TOKENS):
        rows = slice(start, start + (_TOKENS if native else 8 * _TOKENS))
        left, right = (a[rows], b[rows]) if native else (a[rows].float(), b[rows].float())
        for column in range(0, width, panel):
            first = column if a is b else 0
            columns = slice(column, column + panel)
            product = left[:, first:].T @ right[:, columns]
            total[first:, columns] += product
