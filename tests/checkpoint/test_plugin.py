from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny_models import (
    MOE_NAMES,
    NAMES,
    linear_layers,
    logits,
    put_dequantized,
    tiny_model,
    write_quantized,
)
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, LlamaForSequenceClassification

from quantlab.checkpoint import plugin
from quantlab.errors import CheckpointError, QuantlabError
from quantlab.experts import unfuse_experts
from quantlab.nn import QuantLinear

pytestmark = pytest.mark.usefixtures("reference_kernel")


def written(name, folder, dtype=torch.float32, **options):
    """A quantized model's folder, and the model that it must behave like."""
    model = tiny_model(name, dtype)
    unfuse_experts(model)
    layers = write_quantized(model, folder, **options)
    return layers, model


def load(name, folder, auto=None, **options):
    """Through the plain Auto classes; nothing may be missing or left over."""
    auto = auto or (AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM)
    options = {"dtype": "auto", **options}
    model, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def buffers(model):
    quantized = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    return {f"{name}.{key}": buffer for name, module in quantized for key, buffer in module.named_buffers()}


def assert_equal(a, b):
    assert list(a) == list(b)
    assert all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
class TestEveryModel:
    def test_computes_with_the_dequantized_weights(self, name, dtype, tmp_path):
        layers, _ = written(name, tmp_path, dtype)
        model = load(name, tmp_path)
        assert model.dtype == dtype
        assert {n for n, m in model.named_modules() if isinstance(m, QuantLinear)} == set(layers)
        assert not linear_layers(model)
        dense = put_dequantized(copy.deepcopy(model), layers)
        assert torch.equal(logits(model), logits(dense))

    def test_all_else_is_the_original(self, name, dtype, tmp_path):
        layers, original = written(name, tmp_path, dtype)
        put_dequantized(original, layers)
        model = load(name, tmp_path)
        stored = {k: v for k, v in original.state_dict().items() if k.removesuffix(".weight") not in layers}
        assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in stored.items())
        assert torch.equal(logits(model), logits(original))

    def test_saving_and_loading_again_changes_nothing(self, name, dtype, tmp_path):
        written(name, tmp_path / "first", dtype)
        first = load(name, tmp_path / "first")
        first.save_pretrained(tmp_path / "second", max_shard_size="60KB")
        second = load(name, tmp_path / "second")
        assert_equal(first.state_dict(), second.state_dict())
        assert torch.equal(logits(first), logits(second))
        configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("first", "second")]
        assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float32},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"low_cpu_mem_usage": True},
    ],
    ids=str,
)
def test_every_way_of_loading_keeps_the_numbers(name, options, tmp_path):
    written(name, tmp_path, torch.bfloat16)
    model = load(name, tmp_path, **options)
    assert model.dtype == options.get("dtype", torch.bfloat16)
    assert_equal(buffers(model), buffers(load(name, tmp_path)))
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("name", ["llama-tied", "granite-moe", "gpt2", "bert"])
@pytest.mark.parametrize("head", [True, False])
def test_tied_embeddings(name, head, tmp_path):
    layers, _ = written(name, tmp_path / "a", head=head)
    model = load(name, tmp_path / "a")
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(output, QuantLinear) == head
    if not head:
        assert output.weight is embedding.weight
    model.tie_weights()
    model.save_pretrained(tmp_path / "b")
    again = load(name, tmp_path / "b")
    again.tie_weights()
    assert torch.equal(logits(again), logits(put_dequantized(copy.deepcopy(model), layers)))


@pytest.mark.parametrize(("name", "auto"), [("llama", AutoModel), ("mixtral", AutoModel), ("bert", AutoModel)])
def test_loads_without_its_head(name, auto, tmp_path):
    written(name, tmp_path)
    whole, bare = load(name, tmp_path), auto.from_pretrained(tmp_path)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = whole.base_model(input_ids=ids).last_hidden_state
        assert torch.equal(bare(input_ids=ids).last_hidden_state, expected)


def test_loads_with_another_head(tmp_path):
    written("llama", tmp_path)
    model = LlamaForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)
    assert isinstance(model.score, nn.Linear)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_generates(name, tmp_path):
    written(name, tmp_path)
    model = load(name, tmp_path)
    ids = model.generate(torch.arange(3, 8)[None], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert ids.shape == (1, 11)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert"])
def test_dequantizes(name, tmp_path):
    written(name, tmp_path / "a")
    model = load(name, tmp_path / "a")
    expected = logits(model)
    model.dequantize()
    assert not buffers(model)
    assert torch.equal(logits(model), expected)


def test_a_mixture_cannot_be_dequantized(tmp_path):
    written("mixtral", tmp_path)
    with pytest.raises(QuantlabError, match="mixture"):
        load("mixtral", tmp_path).dequantize()


def test_casting_the_loaded_model(tmp_path):
    written("llama", tmp_path)
    model = load("llama", tmp_path)
    before = {key: buffer.clone() for key, buffer in buffers(model).items()}
    model.to(torch.bfloat16)
    assert_equal(buffers(model), before)
    assert logits(model).dtype == torch.bfloat16


def test_what_the_quantizer_says_of_itself(tmp_path):
    written("llama", tmp_path)
    quantizer = load("llama", tmp_path).hf_quantizer
    assert quantizer.is_serializable()
    assert not quantizer.is_trainable


def test_registering_twice_changes_nothing():
    plugin.register()
    plugin.register()


@pytest.mark.parametrize("name", MOE_NAMES)
def test_experts_are_stored_one_by_one(name, tmp_path):
    layers, _ = written(name, tmp_path / "a")
    load(name, tmp_path / "a").save_pretrained(tmp_path / "b")
    keys = [
        set(json.loads((tmp_path / "a/model.safetensors.index.json").read_text())["weight_map"]),
    ]
    from safetensors import safe_open

    with safe_open(tmp_path / "b/model.safetensors", framework="pt") as file:
        keys.append(set(file.keys()))
    assert keys[0] == keys[1]
    assert sum(key.endswith(".down_proj.codes") for key in keys[0]) == sum(n.endswith(".down_proj") for n in layers)


class TestRefuses:
    def changed(self, folder, change):
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    def test_layers_that_the_model_does_not_have(self, tmp_path):
        written("llama", tmp_path)
        self.changed(tmp_path, lambda c: c["layers"][0]["layers"].append("model.layers.7.mlp.up_proj"))
        with pytest.raises(CheckpointError, match=r"model\.layers\.7\.mlp\.up_proj: .*has none"):
            load("llama", tmp_path)

    def test_modules_that_are_not_linear(self, tmp_path):
        written("llama", tmp_path)
        self.changed(tmp_path, lambda c: c["layers"][0]["layers"].append("model.norm"))
        with pytest.raises(CheckpointError, match=r"model\.norm: is a LlamaRMSNorm"):
            load("llama", tmp_path)

    def test_layers_of_another_shape(self, tmp_path):
        written("llama", tmp_path)
        self.changed(tmp_path, lambda c: c["layers"][0].update(in_features=32))
        with pytest.raises(CheckpointError, match="the model has"):
            load("llama", tmp_path)

    def test_newer_formats(self, tmp_path):
        written("llama", tmp_path)
        self.changed(tmp_path, lambda c: c.update(format_version=99))
        with pytest.raises(CheckpointError, match="upgrade"):
            load("llama", tmp_path)

    def test_a_damaged_table(self, tmp_path):
        written("llama", tmp_path)

        def rename(config):
            for group in config["layers"]:
                group["format"] = "int8" if group["format"] == "int4" else group["format"]

        self.changed(tmp_path, rename)
        with pytest.raises(CheckpointError, match="table"):
            load("llama", tmp_path)

    def test_quantizing_while_loading(self, tmp_path):
        tiny_model("llama").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="pre-quantized"):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=plugin.QuantlabConfig())
