"""Attention for one query, in torch's own operations, for a compiled decode step.

While a token is decoded, attention is two small products over the cache. transformers hands them to SDPA, and in
compiled code it copies keys and values for all queries that share them first: 0.2 ms a layer on a CPU, however short
the cache. The same products in plain torch become two loops of the graph without copies, a tenth of that; only for long
caches SDPA is better, called so that nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ONE_QUERY = "one_query"
"""What transformers knows :func:`one_query_attention` by."""

_LONG = 1024  # tokens of a cache up to which the loops are not slower than SDPA


def one_query_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Softmax attention as transformers calls it, in float32; SDPA where there are more queries than one.

    Args:
        module: the attention module.
        query: ``[batch, heads, queries, width]``.
        key: ``[batch, key heads, length, width]``; neighbouring heads of the query share one.
        value: ``[batch, key heads, length, value width]``.
        attention_mask: booleans (True: attend) or what is added, ``[batch or 1, 1, queries, length]``, or None.
        scaling: of the products; None: ``1 / sqrt(width)``.
        position_bias: handed on to SDPA, which knows what to do with one.
        **options: for SDPA.

    Returns:
        ``[batch, queries, heads, value width]`` in the query's dtype, and None for the weights.
    """
    batch, heads, queries, width = query.shape
    several_masks = attention_mask is not None and attention_mask.shape[1] != 1
    if queries != 1 or position_bias is not None or several_masks:
        options |= {"scaling": scaling, "position_bias": position_bias}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    shared, length = key.shape[1:3]
    grouped = query.reshape(batch, shared, heads // shared, width)
    if torch.compiler.is_compiling():
        grouped = _stored(grouped)
    if length > _LONG:
        mixed = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
        return mixed.reshape(batch, 1, heads, value.shape[-1]), None
    scale = width**-0.5 if scaling is None else scaling
    scores = (grouped.unsqueeze(3).float() * scale * key.unsqueeze(2).float()).sum(-1)
    if attention_mask is not None:
        mask = attention_mask.reshape(attention_mask.shape[0], 1, 1, -1)
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1)
    mixed = (weights.unsqueeze(-1) * value.unsqueeze(2).float()).sum(-2)
    return mixed.to(query.dtype).reshape(batch, 1, heads, value.shape[-1]), None


def _stored(tensor: Tensor) -> Tensor:
    """The same tensor, which a compiler must have in memory.

    Else its loops would compute the rotation of the query, sines and all, once for each token of the cache.
    """
    stored = tensor.contiguous()
    return stored.as_strided(stored.shape, stored.stride())


AttentionInterface.register(ONE_QUERY, one_query_attention)
AttentionMaskInterface.register(ONE_QUERY, sdpa_mask)
