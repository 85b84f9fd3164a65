"""What a GGUF file says of a model besides its weights: architecture, sizes, rope; and how some weights lie there.

Names come from the gguf package's ``tensor_mapping``. What it does not know stands here as data: what llama.cpp calls
an architecture, whose query and key rows it wants in its own rope's order, and whose norms it stores with 1 added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import torch

from quantlab.errors import CheckpointError
from quantlab.export.gguf_rope import add_rope


@dataclass(frozen=True)
class Layout:
    """How llama.cpp holds the models of one transformers architecture.

    Attributes:
        architecture: llama.cpp's name.
        rotated_halves: query and key rows are reordered: llama.cpp turns neighbouring rows, transformers two halves.
        norms_plus_one: norm weights are stored with 1 added.
        activation: what it takes between the layers of an MLP.
        biases: the layers of a block that it knows biases of, by its own names.
        needs_biases: it does not load a model without them.
        full_every: every which layer sees everything, the others through a window; 0: windows are not computed.
    """

    architecture: str
    rotated_halves: bool = False
    norms_plus_one: bool = False
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    needs_biases: bool = False
    full_every: int = 0


_QKV = ("attn_q", "attn_k", "attn_v")
_ALL = (*_QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
# By transformers' `model_type`. Each is read back by transformers' own GGUF reader, and run by llama.cpp, in the tests.
LAYOUTS = {
    "llama": Layout("llama", rotated_halves=True, biases=_ALL),
    "mistral": Layout("llama", rotated_halves=True, biases=_ALL),
    "qwen2": Layout("qwen2", biases=_QKV),
    "qwen3": Layout("qwen3"),
    "gemma2": Layout("gemma2", norms_plus_one=True, activation="gelu", full_every=2),
    "gemma3_text": Layout("gemma3", norms_plus_one=True, activation="gelu", full_every=6),
    "phi3": Layout("phi3"),
    "starcoder2": Layout("starcoder2", activation="gelu", biases=_ALL, needs_biases=True),
    "stablelm": Layout("stablelm", biases=_QKV),
}


def layout_of(config: Any) -> Layout:
    """The layout of a model with this config.

    Raises:
        CheckpointError: none is known.
    """
    if config.model_type not in LAYOUTS:
        raise CheckpointError(
            f"model_type {config.model_type!r}: quantlab knows no GGUF layout for it, only for {', '.join(LAYOUTS)}; "
            "export to compressed-tensors, or convert the original with llama.cpp's own converter"
        )
    return LAYOUTS[config.model_type]


def head_size(config: Any) -> int:
    """Dimensions of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def tensor_names(layout: Layout, blocks: int, names: list[str]) -> dict[str, str]:
    """GGUF's name of each of a model's tensors.

    Raises:
        CheckpointError: the package's map has no name for one of them.
    """
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == layout.architecture)
    known = gguf.get_tensor_name_map(kind, blocks)
    found = {}
    for name in names:
        place = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise CheckpointError(f"{name}: gguf's tensor map for {layout.architecture} has no name for it")
        found[name] = place
    return found


def row_order(layout: Layout, config: Any, name: str, rows: int) -> torch.Tensor | None:
    """Which row of a weight or bias comes where in the file; None if they stay."""
    leaf = name.rpartition(".")[0].rpartition(".")[2]
    if not layout.rotated_halves or leaf not in ("q_proj", "k_proj"):
        return None
    heads = config.num_attention_heads if leaf == "q_proj" else config.num_key_value_heads
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def add_metadata(writer: gguf.GGUFWriter, layout: Layout, config: Any, name: str) -> None:
    """Sizes, norms, attention and rope, under the keys that llama.cpp reads.

    Raises:
        CheckpointError: a way to stretch rope that llama.cpp does not have.
    """
    head = head_size(config)
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(config.vocab_size)
    if (eps := getattr(config, "rms_norm_eps", None)) is not None:
        writer.add_layer_norm_rms_eps(eps)
    for attribute in ("layer_norm_eps", "norm_epsilon"):
        if (eps := getattr(config, attribute, None)) is not None:
            writer.add_layer_norm_eps(eps)
    if layout.architecture == "stablelm":
        writer.add_parallel_residual(bool(config.use_parallel_residual))
    if layout.architecture in ("gemma2", "gemma3", "phi3") and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if (cap := getattr(config, "attn_logit_softcapping", None)) is not None:
        writer.add_attn_logit_softcapping(cap)
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        writer.add_final_logit_softcapping(cap)
    add_rope(writer, layout.architecture, config, head)
