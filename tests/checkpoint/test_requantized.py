"""A model that is quantized already, taken as a source: its weights are what its own loader computes with."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import logits, save_tiny, tiny_model, write_quantized

import quantlab
from quantlab.checkpoint.requantized import open_decoded, quant_method_of
from quantlab.checkpoint.source import open_source
from quantlab.errors import CheckpointError

RTN = {"quantizer": "rtn", "scale_search": "absmax", "format": "int4", "granularity": 32}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral", "bert"])
def test_a_folder_of_ours_decodes_to_what_its_layers_compute(name, tmp_path):
    from quantlab.experts import unfuse_experts

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


def rewritten(folder, change, described) -> None:
    """Replace tensors of a tiny model's file, and say in its config how they are stored."""
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        tensors |= change(name, tensors.pop(name))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": described}))


def test_fp8_in_blocks_is_what_its_scales_say(tmp_path):
    """As DeepSeek and Qwen publish: float8 weights, and a float32 scale a block."""
    expected = {}

    def to_fp8(name, tensor):
        if not name.endswith("_proj.weight"):
            return {name: tensor}
        scales = torch.rand(tensor.shape[0] // 32, tensor.shape[1] // 32) + 0.5
        stored = tensor.to(torch.float8_e4m3fn)
        expected[name] = stored.float() * scales.repeat_interleave(32, 0).repeat_interleave(32, 1)
        return {name: stored, f"{name}_scale_inv": scales}

    save_tiny("llama", tmp_path / "model")
    described = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    rewritten(tmp_path / "model", to_fp8, {**described, "modules_to_not_convert": ["lm_head"]})
    with pytest.raises(CheckpointError, match=r"quant_method fp8.*--requantize"):
        quantlab.quantize(tmp_path / "model", RTN, tmp_path / "w4")
    source = open_decoded(tmp_path / "model")
    decoded = source.skeleton()
    source.load(decoded)
    state = decoded.state_dict()
    assert len(expected) == 14
    for name, weight in expected.items():
        assert torch.equal(state[name], weight.to(state[name].dtype)), name
    quantlab.quantize(tmp_path / "model", {**RTN, "format": "int8"}, tmp_path / "w8", requantize=True)
    found = quantlab.load(tmp_path / "w8").model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(found.float(), expected["model.layers.1.mlp.up_proj.weight"], rtol=0, atol=0.01)


def test_mxfp4_experts_are_what_their_scales_say(tmp_path):
    """As gpt-oss is published: two codes a byte, 32 to a scale, which is a power of two."""
    from quantlab.experts import unfuse_experts

    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([magnitudes, -magnitudes])
    generator, expected = torch.Generator().manual_seed(0), {}

    def to_mxfp4(name, tensor):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: tensor}
        experts, inputs, outputs = tensor.shape
        codes = torch.randint(0, 16, (experts, outputs, inputs // 32, 32), generator=generator)
        exponents = torch.randint(-4, 0, (experts, outputs, inputs // 32), generator=generator)
        weight = values[codes] * 2.0 ** exponents[..., None]
        expected[name] = weight.reshape(experts, outputs, inputs).mT
        packed = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        return {f"{name}_blocks": packed, f"{name}_scales": (exponents + 127).to(torch.uint8)}

    save_tiny("gpt-oss", tmp_path)
    rewritten(tmp_path, to_mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    source = open_decoded(tmp_path)
    decoded = source.skeleton()
    source.load(decoded)
    assert len(expected) == 4
    reference = tiny_model("gpt-oss")
    reference.load_state_dict(expected, strict=False)
    unfuse_experts(reference)
    found = decoded.state_dict()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(found[name].float(), tensor), name


def test_what_transformers_cannot_decode_is_refused(tmp_path):
    save_tiny("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="transformers cannot decode its gptq weights here"):
        open_decoded(tmp_path)
