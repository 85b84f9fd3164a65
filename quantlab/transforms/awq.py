"""AWQ, activation-aware weight quantization: Lin et al., arXiv:2306.00978.

A weight that meets large inputs matters more than others. Multiply the inputs' channels in the weight by s before it is
rounded, and divide them by s in the layer that makes the inputs:

    W x  =  (W diag(s)) (diag(1/s) x)  ~  Q(W diag(s)) diag(1/s) x.

A channel with s > 1 is rounded s times finer, as long as it does not raise the scale of its group. How large inputs are
says which channels deserve it, and one number how much: s = a^alpha with a = E|x|, and alpha from a grid.

The paper's second search, for the range at which each group is clipped, is what a scheme's ``scale_search`` does
(``mse`` or ``second-moment``), for the rescaled weight as for any other; there is no option for it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from quantlab.errors import RecipeError
from quantlab.numerics import QTensor, apply_scales
from quantlab.recipe import Scheme
from quantlab.transforms.base import register

# Below this no channel is counted as smaller, and no group of channels as more unlike.
_SMALLEST = 1e-4
# Outputs of a layer by which exponents are compared; the best is then judged by all.
_ROWS = 512


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads the inputs that are to be rescaled.

    Attributes:
        weight: ``[out, in]`` in any dtype.
        x: what it was given, ``[tokens, in]`` in any dtype.
        scheme: how it will be quantized.
    """

    weight: torch.Tensor
    x: torch.Tensor
    scheme: Scheme


@register("awq")
@dataclass(frozen=True)
class Awq:
    """Scales of input channels, found by search and folded into the weights.

    Attributes:
        tokens: of the calibration data that are looked at.
        steps: exponents that are tried: 0, 1/steps, .. up to 1, without 1.
    """

    name: ClassVar[str]
    tokens: int = 512
    steps: int = 20

    def __post_init__(self) -> None:
        for option, least in (("tokens", 1), ("steps", 2)):
            value = getattr(self, option)
            if type(value) is not int or value < least:
                raise RecipeError(f"transform 'awq': {option} {value!r}: use a whole number, at least {least}")

    def search(self, readers: Sequence[Reader], channels: torch.Tensor, count: int) -> torch.Tensor | None:
        """The scales that leave the smallest output error ``sum |Q(W diag(s)) diag(1/s) x - W x|^2``.

        Args:
            readers: all layers that read the inputs and will be quantized.
            channels: int64 ``[in]``, which of the producer's channels each input is a multiple of: values that several
                heads of queries share are one channel that comes several times.
            count: how many channels the producer has.

        Returns:
            Positive, float32 ``[count]``, 1 for channels that no input comes from; None where nothing is better than
            to leave the inputs as they are.
        """
        magnitude = _magnitudes(readers, channels, count)
        some = [_thinned(reader) for reader in readers]
        best, chosen = _output_error(some, None), None
        for step in range(1, self.steps):
            scales = _scales(magnitude, step / self.steps)
            error = _output_error(some, scales[channels])
            if error < best:  # never so for NaN
                best, chosen = error, scales
        if chosen is not None and any(len(reader.weight) > _ROWS for reader in readers):
            better = _output_error(readers, chosen[channels]) < _output_error(readers, None)
            return chosen if better else None
        return chosen


def _thinned(reader: Reader) -> Reader:
    """The layer with some of its outputs: enough to tell one exponent from another."""
    rows = torch.arange(min(len(reader.weight), _ROWS)) * len(reader.weight) // min(len(reader.weight), _ROWS)
    return Reader(reader.weight[rows], reader.x, reader.scheme)


def _magnitudes(readers: Sequence[Reader], channels: torch.Tensor, count: int) -> torch.Tensor:
    """``E|x|`` of each of the producer's channels, ``[count]``; NaN for those that no input comes from."""
    total = sum(reader.x.abs().sum(0, dtype=torch.float32) for reader in readers)
    tokens = sum(len(reader.x) for reader in readers)
    assert isinstance(total, torch.Tensor)
    here = channels.cpu()  # a few numbers; elsewhere they might be summed in another order each time
    uses = torch.bincount(here, minlength=count)
    return (torch.zeros(count).index_add_(0, here, (total / tokens).cpu()) / uses).to(channels.device)


def _scales(magnitude: torch.Tensor, alpha: float) -> torch.Tensor:
    scales = magnitude.clamp(min=_SMALLEST).pow(alpha)
    known = scales[scales.isfinite()]
    return (scales / (known.max() * known.min()).sqrt()).nan_to_num(nan=1.0)


def _output_error(readers: Sequence[Reader], scales: torch.Tensor | None) -> float:
    """``sum |Q(W diag(s)) diag(1/s) x - W x|^2`` over all readers and tokens; s is ``[in]``, or None for ones."""
    error = 0.0
    for reader in readers:
        weight = reader.weight.float() if scales is None else reader.weight.float() * scales
        x = reader.x.float() if scales is None else reader.x.float() / scales
        error += float((x @ (_rounded(weight, x, reader.scheme) - weight).T).square().sum())
    return error


def _rounded(weight: torch.Tensor, x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Rounded to nearest under the layer's own scheme, whatever method will round it in the end."""
    importance = x.square().mean(0) if scheme.scale_search == "second-moment" else None
    grid = scheme.grid_for(weight, importance)
    scales = scheme.choose_scales(weight, grid, importance)
    return QTensor.of(apply_scales(weight, grid, scales), scales, grid).dequantize()
