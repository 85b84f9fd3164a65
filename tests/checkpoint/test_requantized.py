"""A model that is quantized already, taken as a source: its weights are what its own loader computes with."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import logits, save_tiny, tiny_model, write_quantized

import quantlab
from quantlab.checkpoint.requantized import open_decoded, quant_method_of
from quantlab.checkpoint.source import open_source
from quantlab.errors import CheckpointError

RTN = {"quantizer": "rtn", "scale_search": "absmax", "format": "int4", "granularity": 32}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral", "bert"])
def test_a_folder_of_ours_decodes_to_what_its_layers_compute(name, tmp_path):
    from quantlab.nn import unfuse_experts

    model = tiny_model(name)
    unfuse_experts(model)
    write_quantized(model, tmp_path, head=False)
    source = open_decoded(tmp_path)
    decoded = source.skeleton()
    source.load(decoded)
    torch.testing.assert_close(logits(decoded), logits(quantlab.load(tmp_path)), rtol=1e-4, atol=1e-4)
    assert source.fingerprint() == open_decoded(tmp_path).fingerprint()


def test_a_folder_of_ours_is_refused_unless_asked(tmp_path):
    save_tiny("llama", tmp_path / "model")
    quantlab.quantize(tmp_path / "model", {**RTN, "format": "int8"}, tmp_path / "w8")
    with pytest.raises(CheckpointError, match=r"quantized already \(quant_method quantlab\).*--requantize"):
        quantlab.quantize(tmp_path / "w8", RTN, tmp_path / "w4")
    quantlab.quantize(tmp_path / "w8", RTN, tmp_path / "w4", requantize=True)
    again, once = quantlab.load(tmp_path / "w4"), quantlab.load(tmp_path / "w8")
    expected = once.model.layers[1].mlp.up_proj.weight
    found = again.model.layers[1].mlp.up_proj.weight
    assert not torch.equal(found, expected)
    assert (found - expected).square().sum() < 0.01 * expected.square().sum()
    assert quant_method_of(tmp_path / "w4") == "quantlab"


def test_a_model_that_is_not_quantized_is_no_matter(tmp_path):
    save_tiny("llama", tmp_path / "model")
    quantlab.quantize(tmp_path / "model", RTN, tmp_path / "w4", requantize=True)
    assert quant_method_of(tmp_path / "model") is None


def test_compressed_tensors_are_decoded_by_transformers(tmp_path):
    pytest.importorskip("compressed_tensors")
    from quantlab.export import export

    save_tiny("llama-tied", tmp_path / "model")
    mixed = {**RTN, "layers": {"*.down_proj": {"format": "int8"}, "*.o_proj": {"format": "none"}}}
    quantlab.quantize(tmp_path / "model", mixed, tmp_path / "w4")
    export(tmp_path / "w4", "compressed-tensors", tmp_path / "ct", settings={"fused": "any"})
    with pytest.raises(CheckpointError, match=r"quant_method compressed-tensors"):
        open_source(tmp_path / "ct")
    source = open_decoded(tmp_path / "ct")
    decoded = source.skeleton()
    source.load(decoded)
    torch.testing.assert_close(logits(decoded), logits(quantlab.load(tmp_path / "w4")), rtol=1e-4, atol=1e-4)
    assert decoded.lm_head.weight is decoded.model.embed_tokens.weight
    assert getattr(source.config, "quantization_config", None) is None


def test_what_transformers_cannot_decode_is_refused(tmp_path):
    save_tiny("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="transformers cannot decode its gptq weights here"):
        open_decoded(tmp_path)
