"""What a GGUF file says of a model besides its weights: architecture, sizes, rope; and how some weights lie there.

Names come from the gguf package's ``tensor_mapping``. What it does not know stands here as data: what llama.cpp calls
an architecture, whose query and key rows it wants in its own rope's order, and whose norms it stores with 1 added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch

from quantlab.errors import CheckpointError


@dataclass(frozen=True)
class Layout:
    """How llama.cpp holds the models of one transformers architecture.

    Attributes:
        architecture: llama.cpp's name.
        rotated_halves: query and key rows are reordered: llama.cpp turns neighbouring rows, transformers two halves.
        norms_plus_one: norm weights are stored with 1 added.
    """

    architecture: str
    rotated_halves: bool = False
    norms_plus_one: bool = False


# By transformers' `model_type`. Each is read back by transformers' own GGUF reader in the tests.
LAYOUTS = {
    "llama": Layout("llama", rotated_halves=True),
    "mistral": Layout("llama", rotated_halves=True),
    "qwen2": Layout("qwen2"),
    "qwen3": Layout("qwen3"),
    "gemma2": Layout("gemma2", norms_plus_one=True),
    "gemma3_text": Layout("gemma3", norms_plus_one=True),
    "phi3": Layout("phi3"),
    "starcoder2": Layout("starcoder2"),
    "stablelm": Layout("stablelm"),
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


def check_attention(layout: Layout, config: Any) -> None:
    """Refuse what llama.cpp takes for granted of an architecture, and this model has otherwise.

    Raises:
        CheckpointError: names it.
    """
    head = _head(config)
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None and scalar != head:
        raise CheckpointError(
            f"query_pre_attn_scalar {scalar}: llama.cpp scales its attention by the size of a head, {head}"
        )
    every = {"gemma2": 2, "gemma3": 6}.get(layout.architecture)
    if every:
        kinds = [
            ("full" if (i + 1) % every == 0 else "sliding") + "_attention" for i in range(config.num_hidden_layers)
        ]
        if list(config.layer_types) != kinds:
            raise CheckpointError(
                f"layer_types: llama.cpp lets every {every}th layer see everything, this model others; "
                " export to compressed-tensors"
            )


def _head(config: Any) -> int:
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
        CheckpointError: a way to stretch rope that the format has no keys for.
    """
    check_attention(layout, config)
    head = _head(config)
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
    writer.add_rope_dimension_count(int(head * _rope(config).get("partial_rotary_factor", 1.0)))
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
    _add_rope(writer, config, head)


def _rope(config: Any) -> dict[str, Any]:
    """The rules of rope; of a model with several kinds of layers those of full attention."""
    rules = getattr(config, "rope_parameters", None) or {}
    return rules.get("full_attention", rules)


def _add_rope(writer: gguf.GGUFWriter, config: Any, head: int) -> None:
    rules = _rope(config)
    theta = rules.get("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    writer.add_rope_freq_base(theta)
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if local is not None:
        writer.add_rope_freq_base_swa(local.get("rope_theta", 10000.0))
    kind = rules.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rules["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rules["factor"])
        writer.add_rope_scaling_orig_ctx_len(rules["original_max_position_embeddings"])
    elif kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rules, head, theta))
    elif kind == "longrope":
        _add_longrope(writer, config, rules)
    elif kind != "default":
        raise CheckpointError(f"rope_type {kind!r}: GGUF has no keys for it; export to compressed-tensors")


def llama3_divisors(rules: dict[str, Any], head: int, theta: float) -> np.ndarray:
    """What Llama 3 divides its rotary frequencies by, float32 ``[head / 2]``: from ``factor`` (low) to 1 (high)."""
    frequencies = 1.0 / theta ** (np.arange(0, head, 2, dtype=np.float64) / head)
    wavelengths = 2 * math.pi / frequencies
    context, low, high = (rules[f"{key}"] for key in _LLAMA3)
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rules["factor"] + smooth)).astype(np.float32)


_LLAMA3 = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")


def _add_longrope(writer: gguf.GGUFWriter, config: Any, rules: dict[str, Any]) -> None:
    original = rules.get("original_max_position_embeddings") or config.original_max_position_embeddings
    scale = config.max_position_embeddings / original
    factor = 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_attn_factors(rules.get("attention_factor") or factor)
    for name, key in (("long", "long_factor"), ("short", "short_factor")):
        writer.add_tensor(f"rope_factors_{name}.weight", np.array(rules[key], dtype=np.float32))
