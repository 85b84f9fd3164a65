"""The config, the tokenizer and the empty model of a ``.gguf`` file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from quantlab.checkpoint.gguf_file import INSTEAD, ROPE_FREQS, field, or_refuse
from quantlab.errors import CheckpointError

# llama.cpp's pre-tokenizers that cut numbers into single digits; transformers 5.23 has no entry for them.
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
# What transformers 5.23 leaves at its default for some mixtures of experts, and where the file says it.
_EXPERT_SIZES = {
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}


def config_and_tokenizer(path: Path, reader: gguf.GGUFReader) -> tuple[Any, Any]:
    """The two as transformers reads them, with what it drops put back: expert sizes, digits, rope scaling.

    Raises:
        CheckpointError: transformers cannot read one of them, or would drop a rope scaling.
    """
    from tokenizers import pre_tokenizers

    architecture, pre = field(reader, "general.architecture"), field(reader, "tokenizer.ggml.pre")
    vocabulary, release = field(reader, "tokenizer.ggml.model"), f"transformers {transformers.__version__}"
    with tempfile.TemporaryDirectory() as alone:  # a config.json beside the file would be read in its place
        try:
            os.symlink(path, Path(alone) / "model.gguf")
            where, name = alone, "model.gguf"
        except OSError:  # a system without links
            where, name = str(path.parent), path.name
        with or_refuse(f"{path}: {release} cannot read architecture {architecture!r}"):
            config = AutoConfig.from_pretrained(where, gguf_file=name)
        with or_refuse(f"{path}: {release} cannot read its tokenizer, of type {vocabulary!r}"):
            tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    if pre in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    text = config.get_text_config()
    for attribute, key in _EXPERT_SIZES.items():
        if hasattr(text, attribute):
            setattr(text, attribute, field(reader, f"{architecture}.{key}", getattr(text, attribute)))
    _complete_attention(text, reader, architecture)
    if field(reader, "tokenizer.ggml.padding_token_id") is None:  # the class's default is another model's
        text.pad_token_id = None
    tokenizer.model_max_length = getattr(text, "max_position_embeddings", tokenizer.model_max_length)
    _restore_rope_scaling(path, reader, text, architecture)
    return config, tokenizer


def _complete_attention(config: Any, reader: gguf.GGUFReader, architecture: str) -> None:
    """What transformers' table of keys leaves at its default, and llama.cpp derives from the file."""
    for attribute, bias in (("attention_bias", "attn_q.bias"), ("mlp_bias", "ffn_down.bias")):
        if hasattr(config, attribute):  # which no key says: the tensors do
            setattr(config, attribute, any(tensor.name.endswith(bias) for tensor in reader.tensors))
    head = field(reader, f"{architecture}.attention.key_length")
    for attribute in ("head_dim", "query_pre_attn_scalar"):
        if head is not None and getattr(config, attribute, None) is not None:
            setattr(config, attribute, int(head))


def _restore_rope_scaling(path: Path, reader: gguf.GGUFReader, config: Any, architecture: str) -> None:
    """Long-context rope: recovered for Llama 3 from the factors in the file, else refused, never left out."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = getattr(config, "rope_parameters", None) or {}
    rules = [rope, *(rule for rule in rope.values() if isinstance(rule, dict))]
    if any(rule.get("rope_type", "default") != "default" for rule in rules):
        return  # transformers knows the rule of this architecture
    kind = field(reader, f"{architecture}.rope.scaling.type", "none")
    factor = field(reader, f"{architecture}.rope.scaling.factor", 1.0)
    if kind != "none" and factor != 1.0:
        raise CheckpointError(f"{path}: transformers drops its rope scaling {kind!r} by {factor:g}; {INSTEAD}.")
    stored = next((tensor for tensor in reader.tensors if tensor.name == ROPE_FREQS), None)
    if stored is None:
        return
    divisors = torch.from_numpy(np.array(stored.data, dtype=np.float32))
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": rope.get("rope_theta", 10000.0),
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    with or_refuse(f"{path}: {ROPE_FREQS} is not llama3 rope scaling: {config.rope_parameters}"):
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        plain = config.rope_parameters["rope_theta"] ** (-torch.arange(len(divisors)) / len(divisors))
        if not torch.allclose(plain / scaled, divisors, rtol=1e-4):
            raise ValueError(f"the rule gives {plain / scaled}")


def empty_model(path: Path, config: Any, dtype: torch.dtype) -> Any:
    """The model on the meta device: names, shapes and dtypes without memory.

    Raises:
        CheckpointError: transformers has no model for the config.
    """
    with or_refuse(f"{path}: no {config.model_type!r} model fits its metadata"), torch.device("meta"):
        if config.architectures:  # an encoder alone, which only the file knows
            return getattr(transformers, config.architectures[0])._from_config(config, dtype=dtype)
        causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
        auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSeq2SeqLM
        return auto.from_config(config, dtype=dtype)
