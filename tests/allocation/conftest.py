"""Tiny models for plans."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import quantlab

RECIPE = {"granularity": 32, "quantizer": "gptq"}


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tokens():
    return torch.randint(3, 96, (16, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def plan(model, tokens, tmp_path_factory):
    """`quantlab.plan` of the tiny model; tests share what its sensitivities found, unless they name a cache."""
    cache = tmp_path_factory.mktemp("sensitivities")

    def run(budget, **kwargs):
        settings = {"recipe": RECIPE, "calibration": tokens, "cache": cache, **kwargs}
        return quantlab.plan(settings.pop("model", model), budget, **settings)

    return run
