"""A tiny model in a folder, a text, and a sweep of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quantlab.sweep import Setup, sweep

VOCABULARY = 64
SPACE = {
    "recipe": "w4-rtn",
    "calibration": {"samples": 4, "length": 32, "source": "text"},
    "grids": [{"formats": ["int"], "bits": [3, 4], "quantizers": ["rtn", "gptq"], "groups": [32]}],
    "baselines": ["bitsandbytes:nf4"],
}


@pytest.fixture(scope="session")
def place(tmp_path_factory, save_tokenizer) -> Path:
    """A folder with `model` and `text.txt`."""
    root = tmp_path_factory.mktemp("sweep")
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
    LlamaForCausalLM(config).save_pretrained(root / "model")
    save_tokenizer(root / "model", VOCABULARY)
    words = torch.randint(1, VOCABULARY, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    (root / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    return root


@pytest.fixture(scope="session")
def space(place):
    return {**SPACE, "calibration": {**SPACE["calibration"], "source": str(place / "text.txt")}}


@pytest.fixture(scope="session")
def setup(place):
    settings = {"length": 64, "windows": 8, "measures": ("perplexity", "divergence", "calibration")}
    return Setup(text=str(place / "text.txt"), settings=settings, devices=("rtx4090",))


@pytest.fixture(scope="session")
def swept(place, space, setup):
    """A finished sweep, not to be changed."""
    return sweep(place / "model", space, place / "swept", setup=setup)
