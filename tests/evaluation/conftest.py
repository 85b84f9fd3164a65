"""Tiny models in folders: an original, one that is not far from it, and a tokenizer for both."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 64


@pytest.fixture(scope="package")
def folders(tmp_path_factory, save_tokenizer):
    """`original` and `variant`, and a text in `text.txt`."""
    root = tmp_path_factory.mktemp("models")
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
    model = LlamaForCausalLM(config)
    for name, noise in (("original", 0.0), ("variant", 0.3)):
        with torch.no_grad():
            for weight in model.parameters():
                weight += noise * weight.std() * torch.randn_like(weight)
        model.save_pretrained(root / name)
        save_tokenizer(root / name, VOCABULARY)
    words = torch.randint(1, VOCABULARY, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    (root / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    return root
