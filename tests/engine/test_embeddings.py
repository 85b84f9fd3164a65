"""Embeddings: quantized where the recipe names them, looked up row by row, and loaded by transformers."""

from __future__ import annotations

import pytest
import torch
from architectures import MODELS, tiny_model
from transformers import AutoModelForCausalLM

import quantlab
from quantlab.errors import PreflightError, RecipeError
from quantlab.nn import QuantEmbedding, QuantLinear
from quantlab.numerics import QTensor, apply_scales, choose_scales, grid

INT8 = {"format": "int8"}
PATTERNS = {
    "llama": {"model.embed_tokens": INT8},
    "llama-fp16-tied": {"model.embed_tokens": INT8, "lm_head": INT8},
    "gpt2": {"transformer.wte": INT8, "transformer.wpe": {"granularity": "channel"}, "lm_head": {}},
    "gpt-neox": {"*.embed_in": {"format": "e4m3", "granularity": "tensor", "symmetric": True}},
    "opt": {"*embed_tokens": {"symmetric": False}, "lm_head": INT8},
}


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 35).view(2, 16)).logits.float()


def close(ours, original):
    error = (ours - original).square().mean() / original.square().mean()
    return error < 0.1


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_embeddings_are_quantized_where_they_are_named(name, quantizer, original, run):
    result = run(original(name), {"quantizer": quantizer, "scale_search": "mse", "layers": PATTERNS[name]})
    named = {report.layer for report in result.reports if report.block == ""}
    assert len(named) == len(PATTERNS[name])
    model, info = AutoModelForCausalLM.from_pretrained(result.folder, output_loading_info=True)
    assert not any(info.values()), info
    embedded = {n for n, module in model.named_modules() if isinstance(module, QuantEmbedding)}
    assert embedded == {layer for layer in named if "head" not in layer}
    assert torch.equal(logits(model), logits(quantlab.load(result.folder)))
    assert close(logits(model), logits(AutoModelForCausalLM.from_pretrained(original(name))))

    # The same model with every quantized part written out.
    dense = tiny_model(name)
    for part, module in model.named_modules():
        if isinstance(module, QuantEmbedding | QuantLinear):
            weight = module.to_qtensor().dequantize(dense.dtype)
            dense.get_submodule(part).weight = torch.nn.Parameter(
                weight.T if type(dense.get_submodule(part)).__name__ == "Conv1D" else weight
            )
    torch.testing.assert_close(logits(model), logits(dense.eval()), rtol=2e-3, atol=2e-3)


def test_blocks_see_what_the_quantized_embedding_gives(original, run):
    """Two bits are so few that statistics from the original embedding would give other codes."""
    layers = {"model.embed_tokens": {"format": "int2"}}
    kept = run(original("llama"), {}, out="kept")
    changed = run(original("llama"), {"layers": layers}, out="changed")
    one, other = (
        quantlab.load(result.folder).get_submodule("model.layers.0.mlp.down_proj") for result in (kept, changed)
    )
    assert not torch.equal(one.codes, other.codes)


def test_an_embedding_that_a_head_shares_is_not_quantized_alone(original, run):
    with pytest.raises(PreflightError, match=r"model.embed_tokens: shares its weight with lm_head.*name both"):
        run(original("llama-fp16-tied"), {"layers": {"model.embed_tokens": INT8}})


def test_an_embedding_that_does_more_is_left_with_a_word(original, run):
    assert "gemma3" in MODELS
    with pytest.raises(RecipeError, match="computes more than a lookup"):
        run(original("gemma3"), {"layers": {"model.embed_tokens": INT8}})


@pytest.mark.parametrize("changes", [{}, {"granularity": "tensor"}, {"symmetric": False}, {"scale_dtype": "int8"}])
def test_a_lookup_gives_the_rows_of_the_whole(changes):
    weight = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    how = {"symmetric": changes.get("symmetric", True), "stored": changes.get("scale_dtype", "float16")}
    scales = choose_scales(weight, grid("int4"), changes.get("granularity", 16), **how)
    q = QTensor.of(apply_scales(weight, grid("int4"), scales), scales, grid("int4"))
    embedding = QuantEmbedding.from_qtensor(q, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 299, 7], [7, 1, 0]])
    assert torch.equal(embedding(ids), q.dequantize(torch.bfloat16)[ids])
    assert embedding(ids[:0]).shape == (0, 3, 32)
