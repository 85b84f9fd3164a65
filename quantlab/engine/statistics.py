"""What is kept of a layer's inputs while the calibration data passes."""

from __future__ import annotations

from dataclasses import replace

import torch

from quantlab.engine.distributed import Ranks
from quantlab.problem import InputStatistics, Statistic

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
    """

    def __init__(self, wanted: Statistic, width: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._wanted = wanted
        self._moment = self._diagonal = self._shift = self._held_out = self._sum = self._magnitude = None
        self._compared = self._held_out_compared = 0
        if Statistic.SECOND_MOMENT in wanted:
            self._moment = torch.zeros(width, width, device=device)
        elif Statistic.DIAGONAL in wanted:
            self._diagonal = torch.zeros(width, device=device, dtype=torch.float64)
        if Statistic.SHIFT in wanted:
            self._shift = torch.zeros(width, width, device=device)
            self._held_out = torch.zeros(width, width, device=device)

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
        _add_product(self._held_out if held_out else self._shift, original - x, x)
        self._compared += len(x)
        self._held_out_compared += len(x) if held_out else 0

    def join(self, ranks: Ranks) -> None:
        """Take in what the accumulators of the other ranks have seen: afterwards all have the same.

        Sums of float32 numbers a batch, in float64, hardly ever depend on their order: a few vectors are worth it.
        """
        counts = torch.tensor([self.tokens, self._compared, self._held_out_compared])
        ranks.sum(counts)
        self.tokens, self._compared, self._held_out_compared = counts.tolist()
        for total in (self._moment, self._diagonal, self._shift, self._held_out, self._sum):
            if total is not None:
                ranks.sum(total)
        if self._magnitude is not None:
            ranks.maximum(self._magnitude)

    def finish(self) -> InputStatistics:
        """The means over all tokens."""
        if self._moment is not None:
            # Only the lower triangle was summed.
            self._moment = self._moment.tril_().add_(self._moment.tril(-1).T).div_(max(self.tokens, 1))
            self._diagonal = self._moment.diagonal()
        elif self._diagonal is not None:
            self._diagonal = (self._diagonal / max(self.tokens, 1)).float()
        mean = None if self._sum is None else (self._sum / max(self.tokens, 1)).float()
        known = InputStatistics(
            self.tokens, self._moment, self._diagonal, self._shift, mean=mean, magnitude=self._magnitude
        )
        if self._shift is None or self._held_out is None or not self._compared:
            return known
        shift = self._shift.add_(self._held_out).div_(self._compared)
        if not 0 < self._held_out_compared < self._compared:
            return replace(known, shift=shift)
        held_out, share = self._held_out.div_(self._held_out_compared), self._held_out_compared / self._compared
        return replace(known, shift=shift, held_out_shift=held_out, held_out=share)


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
