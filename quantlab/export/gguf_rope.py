"""Rotary positions in a GGUF file: the keys and tensors that llama.cpp reads, for each way to stretch them."""

from __future__ import annotations

import math
from typing import Any

import gguf
import numpy as np

from quantlab.errors import CheckpointError

_LLAMA3 = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
# Whose graphs in llama.cpp read the tensors that these two are stored as; it does not load other models with them.
_WITH_TENSORS = {"llama3": "llama", "longrope": "phi3"}


def rope_of(config: Any) -> dict[str, Any]:
    """The rules of rope; of a model with several kinds of layers those of full attention."""
    rules = getattr(config, "rope_parameters", None) or {}
    return rules.get("full_attention", rules)


def add_rope(writer: gguf.GGUFWriter, architecture: str, config: Any, head: int) -> None:
    """Base, stretching, and how many of a head's dimensions turn.

    Args:
        writer: of the file.
        architecture: llama.cpp's name.
        config: the model's.
        head: dimensions of a head.

    Raises:
        CheckpointError: a way to stretch that the format has no keys for, or llama.cpp no code in this architecture.
    """
    rules = rope_of(config)
    kind = rules.get("rope_type", "default")
    if _WITH_TENSORS.get(kind, architecture) != architecture:
        raise CheckpointError(
            f"rope_type {kind!r}: llama.cpp has it for {_WITH_TENSORS[kind]} only, not for {architecture}; export to "
            "compressed-tensors"
        )
    theta = rules.get("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    writer.add_rope_freq_base(theta)
    writer.add_rope_dimension_count(int(head * rules.get("partial_rotary_factor", 1.0)))
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if local is not None:
        if local.get("rope_type", "default") != "default":
            raise CheckpointError(
                f"rope_type {local['rope_type']!r} in layers with a sliding window: llama.cpp does not stretch those; "
                "export to compressed-tensors"
            )
        writer.add_rope_freq_base_swa(local.get("rope_theta", 10000.0))
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rules["factor"])
    elif kind == "yarn":
        _add_yarn(writer, config, rules)
    elif kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rules, head, theta))
    elif kind == "longrope":
        _add_longrope(writer, config, rules)
    elif kind != "default":
        raise CheckpointError(f"rope_type {kind!r}: GGUF has no keys for it; export to compressed-tensors")


def _add_yarn(writer: gguf.GGUFWriter, config: Any, rules: dict[str, Any]) -> None:
    """llama.cpp multiplies its own attention factor, ``1 + 0.1 ln(factor)``, by the one that a file names."""
    for key, only in (("truncate", True), ("beta_fast", 32), ("beta_slow", 1)):
        if rules.get(key) not in (None, only):  # there are keys for the betas, which are not read
            raise CheckpointError(
                f"rope_type 'yarn' with {key} {rules[key]}: llama.cpp takes {only}, whatever a file says; export to "
                "compressed-tensors"
            )
    original = rules["original_max_position_embeddings"]
    factor = rules.get("factor") or config.max_position_embeddings / original
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(original)
    attention, scale, whole = (rules.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if attention is None and scale and whole:
        attention = _yarn_factor(factor, scale) / _yarn_factor(factor, whole)
    if attention is not None:
        writer.add_rope_scaling_attn_factors(attention / _yarn_factor(factor))


def _yarn_factor(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 1 + 0.1 * scale * math.log(factor)


def llama3_divisors(rules: dict[str, Any], head: int, theta: float) -> np.ndarray:
    """What Llama 3 divides its rotary frequencies by, float32 ``[head / 2]``: from ``factor`` (low) to 1 (high)."""
    frequencies = 1.0 / theta ** (np.arange(0, head, 2, dtype=np.float64) / head)
    wavelengths = 2 * math.pi / frequencies
    context, low, high = (rules[f"{key}"] for key in _LLAMA3)
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rules["factor"] + smooth)).astype(np.float32)


def _add_longrope(writer: gguf.GGUFWriter, config: Any, rules: dict[str, Any]) -> None:
    original = rules.get("original_max_position_embeddings") or config.original_max_position_embeddings
    scale = config.max_position_embeddings / original
    factor = 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_attn_factors(rules.get("attention_factor") or factor)
    for name, key in (("long", "long_factor"), ("short", "short_factor")):
        writer.add_tensor(f"rope_factors_{name}.weight", np.array(rules[key], dtype=np.float32))
