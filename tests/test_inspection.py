"""What inspect reads from a folder, against what is in its files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from quantlab.engine.quantize import quantize
from quantlab.errors import CheckpointError
from quantlab.inspection import inspect


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        attention_bias=True,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.fixture
def result(model, tmp_path):
    """Three bits, but eight in the down projections, none in the first o_proj, asymmetric values."""
    recipe = {
        "format": "int3",
        "granularity": 32,
        "scale_search": "mse",
        "layers": {
            "*.mlp.down_proj": {"format": "int8", "granularity": "channel"},
            "*.v_proj": {"symmetric": False, "granularity": 64},
            "model.layers.0.self_attn.o_proj": {"format": "none"},
        },
    }
    return quantize(model, recipe, tmp_path / "out")


def stored(folder):
    """Bytes and numbers of every tensor in the files, by name."""
    sizes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                tensor = tensors.get_tensor(name)
                sizes[name] = (tensor.numel() * tensor.element_size(), tensor.numel())
    return sizes


def test_layers_are_those_of_the_run(result):
    inspection = inspect(result.folder)
    assert [layer.layer for layer in inspection.layers] == [report.layer for report in result.reports]
    for layer, report in zip(inspection.layers, result.reports, strict=True):
        assert (layer.bits, layer.bytes, layer.shape) == (report.bits, report.bytes, report.shape)
        assert (layer.format, layer.granularity) == (report.format, report.granularity)
        assert (layer.error, layer.metric, layer.quantizer) == (report.error, "weight", "rtn")
    assert inspection.bits == pytest.approx(result.bits)
    assert inspection.recipe == result.recipe.to_dict()
    assert inspection.run["quantlab"]


def test_totals_are_those_of_the_files(model, result):
    inspection = inspect(result.folder)
    sizes = stored(result.folder)
    assert inspection.bytes_quantized + inspection.bytes_kept == sum(size for size, _ in sizes.values())
    assert inspection.bytes_on_disk == result.bytes
    assert inspection.weights == sum(parameter.numel() for parameter in model.parameters())
    kept = {tensor.name for tensor in inspection.kept}
    assert "model.embed_tokens.weight" in kept
    assert "model.layers.0.self_attn.o_proj.weight" in kept
    assert "model.layers.1.self_attn.q_proj.bias" in kept
    assert not any(name.endswith((".codes", ".scales", ".zeros", ".table")) for name in kept)
    expected = 8 * sum(size for size, _ in sizes.values()) / inspection.weights
    assert inspection.bits_of_model == pytest.approx(expected)


def test_it_is_plain_data(result):
    document = json.loads(json.dumps(inspect(result.folder).to_dict()))
    assert document["totals"]["bytes_on_disk"] == result.bytes
    assert len(document["layers"]) == 20


def test_without_log_and_recipe_it_says_what_the_weights_say(result):
    with_log = {layer.layer: layer for layer in inspect(result.folder).layers}
    (result.folder / "run.jsonl").unlink()
    (result.folder / "recipe.yaml").unlink()
    inspection = inspect(result.folder)
    assert inspection.recipe is None
    assert inspection.run == {}
    for layer in inspection.layers:
        assert (layer.error, layer.quantizer, layer.tokens) == (None, None, None)
        known = with_log[layer.layer]
        assert (layer.bits, layer.bytes, layer.shape) == (known.bits, known.bytes, known.shape)
    granularities = {layer.layer.split(".")[-1]: layer.granularity for layer in inspection.layers}
    assert granularities["down_proj"] == "channel"
    assert granularities["q_proj"] == 32


def test_folders_that_it_cannot_read_are_refused(result, model, tmp_path):
    model.save_pretrained(tmp_path / "original")
    with pytest.raises(CheckpointError, match="is not quantized"):
        inspect(tmp_path / "original")
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"without config\.json"):
        inspect(tmp_path / "empty")
    config = result.folder / "config.json"
    described = json.loads(config.read_text())
    described["quantization_config"]["quant_method"] = "gptq"
    (tmp_path / "empty" / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="another tool"):
        inspect(tmp_path / "empty")
    next(result.folder.glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="are missing: model-00002"):
        inspect(result.folder)
    config.unlink()
    with pytest.raises(CheckpointError, match="interrupted run"):
        inspect(result.folder)
