"""A tiny Llama whose tokens are the words w1 .. w63, and a text of them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 64


def llama_of_words() -> LlamaForCausalLM:
    """With random weights, always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def write_words(path: Path) -> None:
    """A text of 4000 random words, always the same."""
    words = torch.randint(1, VOCABULARY, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text(" ".join(f"w{word}" for word in words))
