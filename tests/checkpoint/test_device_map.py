"""A quantized model on several devices, and on disk: accelerate's device maps, through transformers' own loader."""

from __future__ import annotations

import pytest
import torch
from tiny_models import logits, tiny_model, write_quantized
from transformers import AutoModelForCausalLM

import quantlab
from quantlab.experts import unfuse_experts
from quantlab.nn import QuantLinear


@pytest.fixture(params=["llama", "mixtral"])
def folder(request, tmp_path):
    model = tiny_model(request.param)
    unfuse_experts(model)
    write_quantized(model, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def expected(folder, reference_kernel):
    return logits(quantlab.load(folder))


@pytest.mark.parametrize("loader", [quantlab.load, AutoModelForCausalLM.from_pretrained])
def test_everything_on_one_device(loader, folder, expected):
    assert torch.equal(logits(loader(folder, device_map="cpu")), expected)


def test_blocks_on_disk(folder, expected, tmp_path):
    """A block that is on disk is read where it lies when it is called, and gone afterwards."""
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = quantlab.load(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert model.hf_device_map["model.layers.1"] == "disk"
    layer = model.model.layers[1].self_attn.q_proj
    assert isinstance(layer, QuantLinear)
    assert layer.codes.is_meta
    for _ in range(2):
        assert torch.equal(logits(model), expected)
        assert layer.codes.is_meta
    offloaded = [file.name for file in (tmp_path / "offload").glob("*")]
    assert not offloaded  # nothing was written a second time
