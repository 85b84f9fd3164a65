"""Every architecture: quantized, loaded by transformers, and compared with an independent reconstruction."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from architectures import MODELS, tiny_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import quantlab
from quantlab.checkpoint.source import ModuleSource, open_source
from quantlab.engine import preflight
from quantlab.engine.architecture import describe
from quantlab.engine.forward import Forward, shared_inputs, watched
from quantlab.engine.observe import Calibration
from quantlab.nn import QuantLinear
from quantlab.recipe import load_recipe

AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}
CAUSAL = [name for name, tiny in MODELS.items() if tiny.model.endswith(("ForCausalLM", "LMHeadModel"))]
# Layers that see no text: vision towers, and a layer whose weight is used without calling the layer.
UNSEEN = {"mamba": "dt_proj", "jamba": "dt_proj", "llava": "vision_tower", "gemma3-vision": "vision_tower"}


def auto_class(name):
    model = MODELS[name].model
    auto = next((auto for suffix, auto in AUTO.items() if model.endswith(suffix)), model)
    return getattr(transformers, "AutoModelForImageTextToText" if "vision_config" in MODELS[name].options else auto)


def load(name, folder):
    model, info = auto_class(name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def output(model, tokens=None):
    tokens = torch.arange(3, 35).view(2, 16) if tokens is None else tokens
    decoder = {"decoder_input_ids": tokens.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=tokens, **decoder)[0].float()


def stored_tensors(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def stored_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights in float32 from the files alone: none of quantlab's code."""
    tensors = stored_tensors(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    weights = {}
    for group in config["layers"]:
        rows, columns, bits = group["out_features"], group["in_features"], group["bits"]
        for name in group["layers"]:
            stream = np.unpackbits(tensors[f"{name}.codes"].numpy(), axis=1, bitorder="little")
            digits = torch.from_numpy(stream[:, : columns * bits].reshape(rows, columns, bits).astype(np.int64))
            codes = (digits << torch.arange(bits)).sum(2)
            values = tensors[f"{name}.table"][codes].view(rows, group["scale_shape"][1], -1)
            if f"{name}.zeros" in tensors:
                values = values - tensors[f"{name}.zeros"].float()[:, :, None]
            weights[name] = (values * tensors[f"{name}.scales"].float()[:, :, None]).view(rows, columns)
    return weights


def put(model, name, weight):
    """Replace a weight of transformers' own model, whose experts are fused."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        path, expert, projection = name.rsplit(".", 2)
        experts = model.get_submodule(path)
        own = weight.T if experts.is_transposed else weight
        experts.get_parameter(projection).data[int(expert)] = own.to(model.dtype)
        return
    own = weight.T if isinstance(module, Conv1D) else weight
    assert own.shape == module.weight.shape
    module.weight = nn.Parameter(own.to(module.weight.dtype).contiguous(), requires_grad=False)


def reconstruction(name, pair):
    """The original model with the weights that the codes stand for."""
    model = load(name, pair.original)
    for layer, weight in stored_weights(pair.folder).items():
        put(model, layer, weight)
    return model


def linear_in_blocks(name):
    return [layer for layers in describe(skeleton(name)).layers.values() for layer in layers]


def skeleton(name):
    return ModuleSource(tiny_model(name)).skeleton()


@pytest.mark.parametrize("name", MODELS)
def test_loads_in_transformers_and_computes_what_its_codes_say(name, quantized):
    pair = quantized(name)
    model = load(name, pair.folder)
    assert model.dtype == MODELS[name].dtype
    expected = output(reconstruction(name, pair))
    actual = output(model)
    assert actual.isfinite().all()
    tolerance = 1e-4 if model.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    # Quantized it is, but not another model.
    before = output(load(name, pair.original))
    assert not torch.equal(actual, before)
    assert float((actual - before).norm() / before.norm()) < 0.5


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_of_the_blocks_is_quantized_and_saw_every_token(name, quantized, tokens):
    pair = quantized(name)
    model = load(name, pair.folder)
    found = {layer for layer, module in model.named_modules() if isinstance(module, QuantLinear)}
    reported = {report.layer: report for report in pair.result.reports}
    assert found == set(reported) == set(linear_in_blocks(name))
    left = [layer for layer, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
    assert set(left) == set(describe(skeleton(name)).outside)
    for layer, report in reported.items():
        assert np.isfinite(report.error)
        if UNSEEN.get(name, "nothing") in layer:
            assert report.tokens == 0
            assert "rounded to nearest" in report.notes[0]
        elif ".experts." in layer:
            assert 0 < report.tokens < tokens.numel()
        elif name == "funnel":  # it pools between its blocks
            assert report.tokens in (tokens.numel(), tokens.numel() // 2)
        else:
            assert report.tokens == tokens.numel()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_not_quantized_is_kept_to_the_bit(name, quantized):
    pair = quantized(name)
    stored = stored_tensors(pair.folder)
    source = open_source(pair.original)
    model = source.skeleton()
    source.load(model)
    parts = {f"{report.layer}.{leaf}" for report in pair.result.reports for leaf in ("weight", "codes", "scales")}
    kept = {key: tensor for key, tensor in model.state_dict().items() if key not in parts}
    tied = set()
    for key, tensor in kept.items():
        if key in stored:
            assert torch.equal(stored[key], tensor), key
        else:
            tied.add(key)
            assert any(kept[other].data_ptr() == tensor.data_ptr() for other in kept if other in stored), key
    again = load(name, pair.folder)
    for key in tied:  # stored once, and again one tensor when loaded
        assert sum(p.data_ptr() == again.get_parameter(key).data_ptr() for p in again.state_dict().values()) > 1
    scales = {tensor.dtype for key, tensor in stored.items() if key.endswith(".scales")}
    assert scales == {torch.float16}


@pytest.mark.parametrize("name", CAUSAL)
def test_generates(name, quantized):
    model = load(name, quantized(name).folder)
    prompt = torch.tensor([[5, 6, 7]])
    made = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 7)


def groups_of(name, original, tokens):
    """The groups of layers that the engine solves together, block by block."""
    source = open_source(original(name))
    model = source.skeleton()
    source.load(model)
    architecture = describe(model)
    recipe = load_recipe({"quantizer": "gptq", "granularity": 16})
    plan = preflight.plan(recipe, architecture, model)
    found = []
    with torch.no_grad(), Calibration(model, None, architecture, [tokens], []) as calibration:
        for block in architecture.blocks:
            assert calibration.standing_before() == block
            planned = [plan[layer] for layer in architecture.layers[block]]
            for group, statistics in calibration.observe(planned, last=False):
                found.append([layer.name.removeprefix(f"{block}.") for layer in group])
                assert statistics.tokens > 0
    return found


QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
GATED = [QKV, ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", GATED),
        ("gemma3", GATED),
        ("cohere", [[*QKV, "mlp.gate_proj", "mlp.up_proj"], ["self_attn.o_proj"], ["mlp.down_proj"]]),
        ("phi3", [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]]),
        ("gpt2", [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]]),
        (
            "falcon-new",
            [
                ["self_attention.query_key_value"],
                ["self_attention.dense"],
                ["mlp.dense_h_to_4h"],
                ["mlp.dense_4h_to_h"],
            ],
        ),
        (
            "falcon",
            [["self_attention.query_key_value", "mlp.dense_h_to_4h"], ["self_attention.dense"], ["mlp.dense_4h_to_h"]],
        ),
        ("phi", [[*QKV, "mlp.fc1"], ["self_attn.dense"], ["mlp.fc2"]]),
        ("gptj", [["attn.k_proj", "attn.v_proj", "attn.q_proj", "mlp.fc_in"], ["attn.out_proj"], ["mlp.fc_out"]]),
        (
            "bert",
            [
                ["attention.self.query", "attention.self.key", "attention.self.value"],
                ["attention.output.dense"],
                ["intermediate.dense"],
                ["output.dense"],
            ],
        ),
        (
            "mixtral",
            [QKV, ["self_attn.o_proj"]]
            + [[f"mlp.experts.{e}.{part}"] for e in range(4) for part in ("gate_up_proj", "down_proj")],
        ),
    ],
)
def test_layers_that_share_an_input_are_solved_together(name, expected, original, tokens):
    found = groups_of(name, original, tokens)
    half = len(found) // 2
    assert [sorted(group) for group in found[:half]] == [sorted(group) for group in expected]
    assert found[:half] == found[half:]


def test_an_input_written_to_in_place_is_another_input():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})

    def forward(input_ids):
        x = torch.ones(2, 4)
        model["a"](x)
        model["b"](x)
        x += 1
        model["c"](x)

    model.forward = forward
    with torch.no_grad(), watched(model, ["a", "b", "c"]):
        scout = Forward(model, torch.zeros(1, 1), ())
        scout.log = []
        scout.advance()
    assert shared_inputs(scout.log) == [["a", "b"], ["c"]]


def test_experts_without_tokens_are_rounded_to_nearest_and_reported(original, run, tmp_path):
    result = run(original("mixtral"), calibration=torch.tensor([[5, 6]]))
    unseen = [report for report in result.reports if report.tokens == 0]
    assert unseen
    assert all(".experts." in report.layer for report in unseen)
    assert all("no calibration token reached it" in report.notes[0] for report in unseen)
    assert all(report.metric == "weight" for report in unseen)
    rounded = run(original("mixtral"), {"quantizer": "rtn", "scale_search": "mse"}, "rtn", calibration=None)
    expected, actual = stored_tensors(rounded.folder), stored_tensors(result.folder)
    for report in unseen:
        for leaf in ("codes", "scales"):
            assert torch.equal(actual[f"{report.layer}.{leaf}"], expected[f"{report.layer}.{leaf}"])
    assert output(load("mixtral", result.folder)).isfinite().all()


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "bert-mlm", "opt", "bloom"])
def test_a_quantized_head_lets_go_of_the_embedding_that_it_was_tied_to(name, original, run):
    outside = describe(skeleton(name)).outside
    head = next(layer for layer in outside if layer.endswith(("lm_head", "decoder")))
    result = run(original(name), {"layers": {head: {"format": "int8"}}})
    report = result.reports[-1]
    assert (report.layer, report.format, report.tokens) == (head, "int8", 256)
    model = load(name, result.folder)
    assert isinstance(model.get_submodule(head), QuantLinear)
    # The config says so where this was the only tie; BERT's decoder still has its bias in common.
    assert model.config.tie_word_embeddings == (name == "bert-mlm")
    embedding = model.get_input_embeddings().weight
    assert torch.equal(embedding, load(name, original(name)).get_input_embeddings().weight)
    pair = type("Pair", (), {"original": original(name), "folder": result.folder})
    torch.testing.assert_close(output(model), output(reconstruction(name, pair)), rtol=1e-4, atol=1e-4)


def test_layers_before_the_blocks_are_calibrated_too(original, run, tokens):
    result = run(original("opt-projected"), {"layers": {"*.project_*": {"format": "int8"}}})
    assert {report.tokens for report in result.reports} == {tokens.numel()}
    assert len(result.reports) == 14
    pair = type("Pair", (), {"original": original("opt-projected"), "folder": result.folder})
    model = load("opt-projected", result.folder)
    expected = output(reconstruction("opt-projected", pair))
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama-bf16", "qwen3", "mixtral", "gpt2", "gpt-oss"])
def test_a_model_in_memory_gives_the_same_bytes_as_its_folder(name, original, quantized, run):
    pair = quantized(name)
    # Not of bfloat16: there `model.to(dtype)` rounds the rotary frequencies too, which from_pretrained does not.
    model = load(name, original(name)) if name == "llama-bf16" else tiny_model(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    result = run(model.train())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    weights = sorted(file.name for file in pair.folder.glob("*.safetensors"))
    assert weights
    for file in [*weights, "config.json", "model.safetensors.index.json", "recipe.yaml"]:
        assert (result.folder / file).read_bytes() == (pair.folder / file).read_bytes(), file


def test_no_calibration_is_needed_for_plain_rounding(original, run):
    result = run(original("llama"), {"quantizer": "rtn", "scale_search": "absmax"}, calibration=None)
    assert result.calibration == {}
    assert len(result.reports) == 14
    assert output(load("llama", result.folder)).isfinite().all()


def test_quantlab_load_takes_it(quantized):
    assert isinstance(quantlab.load(quantized("bert").folder), transformers.BertModel)
