"""Rotations that fold into the weights: QuaRot (arXiv:2404.00456), by the names of SpinQuant (arXiv:2405.16406).

R1 rotates the residual stream. Every row vector ``x`` of it becomes ``x R1``: what writes to it has its outputs
rotated, what reads it has its inputs rotated, and the two rotations cancel,

    embedding  E -> E R1          writer  W -> R1^T W, b -> b R1          reader  W -> W diag(g) R1.

Between stream and reader stands a norm, ``n(x) * g + b``. Its gains ``g`` move into the reader, because only the
bare norm commutes with a rotation: ``n(x R1) = n(x) R1`` for an RMSNorm, and for a LayerNorm if R1 keeps the vector of
all ones, and with it the mean. Its bias stays with it, as ``(b / g) R1``, so that readers need none.

R2 rotates the vectors that a head of attention takes from its values: between ``v_proj`` and ``o_proj`` there are only
sums of them. It folds into the outputs of the one, head by head, and into the inputs of the other.

An outlier channel, which takes the range of a scale for itself, is spread over all channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from quantlab.errors import RecipeError
from quantlab.numerics.orthogonal import Rotation
from quantlab.transforms.base import register

# Rows that are rotated at a time: an embedding in float64 would be several times the size of a block.
_ROWS = 8192


@register("hadamard")
@dataclass(frozen=True)
class Hadamard:
    """Randomized Hadamard rotations, folded into the weights.

    Attributes:
        seed: of the random signs.
        residual: rotate the residual stream (R1). The embedding and the head then differ: a tied head is untied.
        value_heads: rotate the values of each head (R2), where the model has a layer of their own for them.
    """

    name: ClassVar[str]
    seed: int = 0
    residual: bool = True
    value_heads: bool = True

    def __post_init__(self) -> None:
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise RecipeError(f"transform 'hadamard': seed {self.seed!r}: use a whole number, 0 or more")
        for option in ("residual", "value_heads"):
            if type(getattr(self, option)) is not bool:
                raise RecipeError(f"transform 'hadamard': {option} {getattr(self, option)!r}: use true or false")
        if not (self.residual or self.value_heads):
            raise RecipeError(
                "transform 'hadamard': residual and value_heads are both false: nothing to rotate; leave it out"
            )


def rotate_weight(
    weight: torch.Tensor,
    *,
    gain: torch.Tensor | None = None,
    inputs: Rotation | None = None,
    outputs: Rotation | None = None,
) -> torch.Tensor:
    """``R_out^T W diag(g) R_in``, in float64, rounded once.

    Args:
        weight: ``[..., out, in]`` in any floating point dtype; what is returned has the same.
        gain: float64 ``[in]``, of the norm before the layer.
        inputs: the rotation of the inputs, or of each head of them; of the rows of an embedding.
        outputs: the rotation of the outputs, or of each head of them.
    """
    if outputs is not None:
        turned = weight.double() if gain is None else weight.double() * gain
        turned = outputs.apply(turned.mT).mT  # (W^T R)^T
        return (turned if inputs is None else inputs.apply(turned)).to(weight.dtype)
    parts = []
    for rows in weight.split(_ROWS, dim=-2):
        part = rows.double() if gain is None else rows.double() * gain
        parts.append((part if inputs is None else inputs.apply(part)).to(weight.dtype))
    return torch.cat(parts, dim=-2)
