"""What is exported decodes, in compressed-tensors' own hands, to the very weights that the codes stood for."""

from __future__ import annotations

import json

import pytest
import torch
from quantized_folders import SIZES, decoded, logits, quantized, tiny
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

import quantlab
from quantlab.checkpoint.quantized import QuantizedFolder
from quantlab.errors import CheckpointError
from quantlab.export import export
from quantlab.export.compressed_tensors import rounds_inputs

pytest.importorskip("compressed_tensors")

NEOX = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
EXACT = {
    **{f"int{bits}": {"format": f"int{bits}"} for bits in range(2, 9)},
    "int4-narrow": {"format": "int4-narrow"},
    "int4-64": {"format": "int4", "granularity": 64},
    "int8-channel": {"format": "int8", "granularity": "channel"},
    "int4-tensor": {"format": "int4", "granularity": "tensor"},
    "fp8-channel": {"format": "e4m3", "granularity": "channel"},
    "mxfp4": {"format": "e2m1", "scale_dtype": "e8m0"},
    "mxfp6": {"format": "e2m3", "scale_dtype": "e8m0"},
    "mxfp8": {"format": "e4m3", "scale_dtype": "e8m0"},
    "nvfp4": {"format": "e2m1", "granularity": 16, "scale_dtype": "e4m3"},
    "mixed-bits": {"format": "int4", "layers": {"*.down_proj": {"format": "int8"}, "lm_head": {"format": "int8"}}},
    "mixed-formats": {
        "format": "int4",
        "layers": {"*.o_proj": {"format": "e2m1", "scale_dtype": "e8m0"}, "*.layers.0.mlp.*": {"format": "none"}},
    },
}


def loaded(folder, dtype="auto"):
    """The model as anybody loads it, its weights decoded by the library as its first forward does."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("name", EXACT)
def test_plain_from_pretrained_decodes_the_same_weights(name, tmp_path):
    folder = quantized(tmp_path, EXACT[name])
    done = export(folder, "compressed-tensors", tmp_path / "ct", settings={"fused": "any"})
    assert done.exact
    assert not done.notes
    model = loaded(tmp_path / "ct")
    found = logits(model)  # the first forward decodes
    expected = decoded(folder)
    assert {layer.layer for layer in done.layers} == set(expected)
    for layer, weight in expected.items():
        got = model.get_submodule(layer).weight
        if name == "nvfp4":  # w = value * (scale / global), where ours is scale * (1 / global)
            torch.testing.assert_close(got.float(), weight, rtol=2**-8, atol=0)
        else:
            assert torch.equal(got, weight.to(torch.bfloat16)), layer
    ours = logits(quantlab.load(folder))
    assert (found - ours).abs().max() < 0.05 * ours.std()


ACTIVATIONS = {
    "w8a8": {"format": "int8", "granularity": "channel", "activations": "int8"},
    "w4a8": {"format": "int4", "granularity": "channel", "activations": "int8"},
    "w8a8-tensor": {"format": "int8", "granularity": "tensor", "activations": "int8"},
    "fp8": {"format": "e4m3", "granularity": "channel", "activations": "fp8"},
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_rounded_by_the_library_as_they_are_here(name, tmp_path):
    folder = quantized(tmp_path, ACTIVATIONS[name])
    done = export(folder, "compressed-tensors", tmp_path / "ct")
    assert done.exact
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    kind = "float" if name == "fp8" else "int"
    assert config["format"] == group["format"] == f"{kind}-quantized"
    inputs = {key: group["input_activations"][key] for key in ("num_bits", "type", "symmetric", "strategy", "dynamic")}
    assert inputs == {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    assert rounds_inputs(config)
    assert QuantizedFolder(folder).rounds_inputs
    model = loaded(tmp_path / "ct")
    assert logits(model).isfinite().all()
    our_model = quantlab.load(folder)
    for layer, weight in decoded(folder).items():
        assert torch.equal(model.get_submodule(layer).weight, weight.to(torch.bfloat16)), layer
        x = torch.randn(2, 8, weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
        theirs, ours = (each.get_submodule(layer)(x).float() for each in (model, our_model))
        without = x.float() @ weight.T
        assert (theirs - without).norm() > 0.5 * (ours - without).norm()
        # The library divides by 127.5 where servers and we divide by 127, and rounds scales to bfloat16.
        assert (theirs - ours).norm() < 1.6 * (ours - without).norm()
        assert (ours - without).norm() < (0.04 if name == "fp8" else 0.015) * without.norm()


@pytest.mark.parametrize("inputs", [{}, {"layers": {"*.k_proj": ACTIVATIONS["w8a8"]}}], ids=["none", "some"])
def test_folders_say_whether_any_layer_rounds_its_inputs(inputs, tmp_path):
    folder = quantized(tmp_path, {"format": "int8", "granularity": "channel", **inputs})
    export(folder, "compressed-tensors", tmp_path / "ct", settings={"fused": "any"})
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert QuantizedFolder(folder).rounds_inputs == rounds_inputs(config) == bool(inputs)
    assert not rounds_inputs({"quant_method": "gptq", "bits": 4})


@pytest.mark.parametrize("to", ["gptq", "gguf"])
def test_formats_of_weights_alone_say_what_is_lost(to, tmp_path):
    folder = quantized(tmp_path, ACTIVATIONS["w8a8"])
    try:
        done = export(folder, to, tmp_path / ("m.gguf" if to == "gguf" else "m"))
    except CheckpointError as error:
        pytest.skip(f"{to} needs more than this model has: {error}")
    assert any("no word for activations" in note and "int8" in note for note in done.notes)


@pytest.mark.parametrize("name", ["int3", "int8-channel", "mxfp4"])
def test_the_dequantizing_load_agrees(name, tmp_path):
    from transformers import CompressedTensorsConfig

    folder = quantized(tmp_path, EXACT[name])
    export(folder, "compressed-tensors", tmp_path / "ct")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ct", dtype="auto", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    for layer, weight in decoded(folder).items():
        assert torch.equal(model.get_submodule(layer).weight, weight.to(torch.bfloat16))


def test_the_config_is_valid_and_says_what_is_not_quantized(tmp_path):
    from compressed_tensors.quantization import QuantizationConfig

    folder = quantized(tmp_path, EXACT["int4-64"])
    export(folder, "compressed-tensors", tmp_path / "ct")
    described = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    QuantizationConfig.model_validate(described)
    assert described["ignore"] == ["lm_head"]
    assert described["format"] == "pack-quantized"
    (group,) = described["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["weights"]["group_size"] == 64


def test_corrections_become_an_adapter_beside_the_codes(tmp_path):
    folder = quantized(tmp_path, {"format": "int4", "compensation": "lorc", "compensation_options": {"rank": 4}})
    done = export(folder, "compressed-tensors", tmp_path / "ct")
    assert not done.exact
    assert "PEFT adapter" in done.notes[0]
    config = json.loads((tmp_path / "ct" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "ct")
    assert config["r"] == 4


class TestRefuses:
    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"format": "int4", "symmetric": False}, "zero points would be packed.*--requantize"),
            ({"format": "nf4"}, "no scheme has nf4"),
            ({"format": "int4", "scale_dtype": "int8"}, "scales stored as int8"),
            ({"format": "int4", "scale_dtype": "float32", "scale_search": "mse"}, "no numbers of the model's dtype"),
        ],
    )
    def test_layers_that_it_cannot_hold(self, changes, reason, tmp_path):
        folder = quantized(tmp_path, changes)
        with pytest.raises(CheckpointError, match=rf"model\.layers\.\d\..*{reason}"):
            export(folder, "compressed-tensors", tmp_path / "ct")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["quantized"]
        done = export(folder, "compressed-tensors", tmp_path / "ct", requantize=True)
        assert all("rounded again" in layer.note for layer in done.layers)
        model = loaded(tmp_path / "ct")
        logits(model)
        for layer, weight in decoded(folder).items():
            error = model.get_submodule(layer).weight.float() - weight
            assert error.square().sum() < 0.05 * weight.square().sum()

    def test_fused_layers_that_disagree(self, tmp_path):
        folder = quantized(tmp_path, {"format": "int4", "layers": {"*.k_proj": {"format": "int8"}}})
        with pytest.raises(CheckpointError, match=r"servers run the two as one layer.*fused=any"):
            export(folder, "compressed-tensors", tmp_path / "ct")
        assert not (tmp_path / "ct").exists()

    def test_global_scales_of_fused_layers_that_differ(self, tmp_path):
        folder = quantized(tmp_path, EXACT["nvfp4"])
        with pytest.raises(CheckpointError, match="another global scale"):
            export(folder, "compressed-tensors", tmp_path / "ct")
        done = export(folder, "compressed-tensors", tmp_path / "ct", requantize=True)
        assert {layer.exact for layer in done.layers} == {True, False}
        tensors = load_file(tmp_path / "ct" / "model.safetensors")
        for layer in range(2):
            found = [tensors[f"model.layers.{layer}.self_attn.{p}_proj.weight_global_scale"] for p in "qkv"]
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])
        model = loaded(tmp_path / "ct")
        logits(model)
        for layer, weight in decoded(folder).items():
            error = model.get_submodule(layer).weight.float() - weight
            assert error.square().sum() < 0.01 * weight.square().sum(), layer

    def test_layers_that_are_no_linear_layers(self, tmp_path):
        config = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=300, n_positions=64)
        folder = quantized(tmp_path, {"format": "int4"}, tiny(config))
        with pytest.raises(CheckpointError, match="it is Conv1D"):
            export(folder, "compressed-tensors", tmp_path / "ct")
        export(folder, "compressed-tensors", tmp_path / "ct", requantize=True)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype="auto")
        expected = decoded(folder)["transformer.h.0.mlp.c_fc"].T.to(torch.bfloat16)
        assert torch.equal(plain.transformer.h[0].mlp.c_fc.weight, expected)

    @pytest.mark.parametrize("to", ["compressed-tensors", "gptq"])
    @pytest.mark.parametrize("config", [None, Phi3Config(**SIZES)], ids=["llama", "phi3"])
    def test_biases_that_config_json_does_not_tell_of(self, to, config, tmp_path):
        ids = torch.randint(3, 300, (4, 32), generator=torch.Generator().manual_seed(0))
        recipe = {"format": "int4", "granularity": 32, "compensation": "bias"}
        quantlab.quantize(tiny(config), recipe, tmp_path / "quantized", calibration=ids)
        with pytest.raises(CheckpointError, match=r"proj\.bias \(of \d+ such\).*leaves it out"):
            export(tmp_path / "quantized", to, tmp_path / "out")
        with pytest.raises(CheckpointError, match="leaves it out"):
            export(tmp_path / "quantized", to, tmp_path / "out", requantize=True)
        assert not (tmp_path / "out").exists()

    def test_what_is_not_quantized(self, tmp_path):
        tiny().save_pretrained(tmp_path / "plain")
        with pytest.raises(CheckpointError, match="is not quantized"):
            export(tmp_path / "plain", "compressed-tensors", tmp_path / "ct")

    def test_unknown_formats_and_settings(self, tmp_path):
        folder = quantized(tmp_path, {"format": "int4"})
        with pytest.raises(CheckpointError, match="use one of compressed-tensors"):
            export(folder, "ggml", tmp_path / "ct")
        with pytest.raises(CheckpointError, match="--set nonsense"):
            export(folder, "gptq", tmp_path / "ct", settings={"nonsense": 1})


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SIZES, head_dim=16, sliding_window=None),
        Qwen2Config(**SIZES),
        Qwen3Config(**SIZES, head_dim=32),
        Phi3Config(**SIZES),
        Phi3Config(**{**SIZES, "tie_word_embeddings": True}),
        GPTNeoXConfig(**NEOX),
    ],
    ids=["mistral", "qwen2", "qwen3", "phi3", "phi3-tied", "neox"],
)
def test_other_families(config, tmp_path):
    folder = quantized(tmp_path, {"format": "int4"}, tiny(config))
    assert export(folder, "compressed-tensors", tmp_path / "ct").exact
    found = logits(loaded(tmp_path / "ct", torch.float32))
    ours = logits(quantlab.load(folder, dtype=torch.float32))
    assert (found - ours).abs().max() < 1e-4 * ours.std()


def test_a_quantized_head_that_was_tied(tmp_path):
    model = tiny(LlamaConfig(**{**SIZES, "tie_word_embeddings": True}))
    folder = quantized(tmp_path, {"format": "int4", "layers": {"lm_head": {"format": "int8"}}}, model)
    export(folder, "compressed-tensors", tmp_path / "ct", settings={"fused": "any"})
    again = loaded(tmp_path / "ct")
    logits(again)
    assert torch.equal(again.lm_head.weight, decoded(folder)["lm_head"].to(torch.bfloat16))
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)
