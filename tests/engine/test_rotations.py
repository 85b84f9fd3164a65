"""The transform hadamard on every architecture: the same output, or a refusal that says why."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers
from architectures import _GROUPED, MODELS, tiny_model
from test_architectures import load, output, stored_weights

import quantlab
from quantlab.checkpoint.source import ModuleSource, open_source, parameter_bytes
from quantlab.engine import hadamard
from quantlab.engine.architecture import describe, set_weight
from quantlab.engine.hadamard import rotate
from quantlab.engine.progress import Silent
from quantlab.errors import PreflightError, RecipeError
from quantlab.transforms import Hadamard

# Those that cannot be rotated, and why.
REFUSED = {
    **{
        name: rf"model\.layers\.0: .* because model\.layers\.0\.post_{norm} has gains of its own"
        for name, norm in {
            "gemma2": "feedforward_layernorm",
            "gemma3": "feedforward_layernorm",
            "olmo2": "feedforward_layernorm",
            "glm4": "mlp_layernorm",
        }.items()
    },
    **{
        name: rf"before the blocks: .* because {norm} has gains of its own"
        for name, norm in {
            "bloom": "transformer.word_embeddings_layernorm",
            "bert": "embeddings.LayerNorm",
            "bert-mlm": "bert.embeddings.LayerNorm",
            "roberta": "roberta.embeddings.LayerNorm",
            "distilbert": "distilbert.embeddings.LayerNorm",
            "deberta-v2": "deberta.embeddings.LayerNorm",
            "modernbert": "model.embeddings.norm",
            "funnel": "funnel.embeddings.layer_norm",
            "bart": "model.decoder.layernorm_embedding",
            "xlm": "transformer.layer_norm1.1",
        }.items()
    },
    **dict.fromkeys(
        ["opt-projected", "electra", "albert", "albert-groups"],
        r"before the blocks: .* something other than embeddings, norms and linear layers",
    ),
    "rwkv": r"rwkv\.blocks\.0: .* has gains of its own",
    "t5": r"decoder\.block\.1 or behind it: .* no linear layer behind decoder\.final_layer_norm",
    "t5-encoder": r"encoder\.block\.1 or behind it: .* no linear layer behind encoder\.final_layer_norm",
    "llava": r"model\.vision_tower\.encoder\.layers\.0: .* text alone does not reach",
    "gemma3-vision": r"model\.vision_tower\.encoder\.layers\.0: .* text alone does not reach",
}
ROTATED = [name for name in MODELS if name not in REFUSED]
# Fused q/k/v, latent attention, no attention.
NO_VALUE_HEADS = {
    *("phi3", "gpt2", "gpt2-bf16", "gpt-neox", "falcon", "falcon-new", "mpt", "codegen", "gpt-bigcode"),
    *("deepseek-v2", "deepseek-v3", "mamba", "mamba2"),
}


def rotated(model, **options):
    source = ModuleSource(model)
    return rotate(source, describe(source.skeleton()), Hadamard(**options))


def loaded(source):
    model = source.skeleton()
    source.load(model)
    return model


def assert_same_output(one, other):
    expected = output(one)
    torch.testing.assert_close(output(other), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ROTATED)
def test_the_output_is_unchanged_and_everything_is_rotated(name):
    model = tiny_model(name).float()
    source, notes = rotated(model)
    turned = loaded(source)
    assert_same_output(model, turned)
    assert (notes != ()) == (name in NO_VALUE_HEADS)
    changed, kept = [], []
    for layer in describe(turned).all_layers:
        before, after = (m.get_submodule(layer).get_parameter("weight") for m in (loaded(ModuleSource(model)), turned))
        (kept if torch.allclose(before, after) else changed).append(layer)
    inner = ("x_proj", "dt_proj", "q_b_proj", "kv_b_proj")  # not on the stream
    assert all(layer.endswith(inner) for layer in kept), kept
    embedding = model.get_input_embeddings().weight
    assert not torch.allclose(turned.get_input_embeddings().weight, embedding)
    norms = embedding.norm(dim=1)
    torch.testing.assert_close(turned.get_input_embeddings().weight.norm(dim=1), norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rotated_is_refused_with_the_reason(name):
    with pytest.raises(PreflightError, match=REFUSED[name]) as refused:
        rotated(tiny_model(name))
    assert "--set transforms.hadamard.residual=false" in str(refused.value)


def test_gemma_keeps_its_gains_as_one_plus_weight():
    torch.manual_seed(0)
    config = transformers.GemmaConfig(**_GROUPED, head_dim=16)
    model = transformers.GemmaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    turned = loaded(rotated(model)[0])
    assert_same_output(model, turned)
    assert not turned.model.layers[1].input_layernorm.weight.any()
    llama = loaded(rotated(tiny_model("llama"))[0])
    assert torch.equal(llama.model.layers[1].input_layernorm.weight, torch.ones(64))


@pytest.mark.parametrize("name", ["gptj", "gpt2"])
def test_a_layer_norm_keeps_its_bias_so_that_readers_need_none(name):
    model = tiny_model(name)
    norm = model.transformer.h[0].ln_1
    norm.bias.data[3] = 7.0
    norm.weight.data[:4], norm.bias.data[:2] = torch.tensor([0.0, -0.5, 0.3, 1.5]), torch.tensor([0.0, 1.0])
    assert_same_output(model, loaded(rotated(model)[0]))
    norm.bias.data[0] = 1.0
    with pytest.raises(PreflightError, match=r"transformer\.h\.0\.ln_1: .* gains are \(almost\) zero"):
        rotated(model)


def test_heads_alone_leave_the_rest_as_it_was():
    model = tiny_model("llama-fp16-tied").float()
    source, _ = rotated(model, residual=False)
    turned = loaded(source)
    assert_same_output(model, turned)
    assert turned.lm_head.weight is turned.model.embed_tokens.weight
    assert source.config.tie_word_embeddings
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, turned.get_parameter(n))}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {"v_proj", "o_proj"}
    gemma = tiny_model("gemma3").float()  # its residual stream cannot be rotated, its heads can
    assert_same_output(gemma, loaded(rotated(gemma, residual=False)[0]))
    with pytest.raises(PreflightError, match=r"GPT2LMHeadModel: .* finds nothing to rotate"):
        rotated(tiny_model("gpt2"), residual=False)


def test_the_stream_alone_leaves_the_heads(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(hadamard, "find_value_heads", None)
    assert_same_output(model, loaded(rotated(model, value_heads=False)[0]))


@pytest.mark.parametrize("part", ["writers", "embeddings", "norms", "readers", "centred"])
def test_a_wrong_guess_does_not_get_through(part, monkeypatch):
    def wrong(*args):
        stream = hadamard_find(*args)
        if part == "centred":
            return replace(stream, norms=tuple(replace(norm, centred=False) for norm in stream.norms))
        if part == "readers":
            norm = stream.norms[1]
            return replace(stream, norms=(stream.norms[0], replace(norm, readers=norm.readers[1:]), *stream.norms[2:]))
        return replace(stream, **{part: getattr(stream, part)[1:]})

    hadamard_find = hadamard.find_stream
    monkeypatch.setattr(hadamard, "find_stream", wrong)
    with pytest.raises(PreflightError, match="the model's output would change"):
        rotated(tiny_model("opt"))


def test_a_wrong_pair_of_value_heads_is_left_out(monkeypatch):
    def wrong(*args):
        return [replace(pair, values=pair.values.replace("v_proj", "k_proj")) for pair in find(*args)]

    find = hadamard.find_value_heads
    monkeypatch.setattr(hadamard, "find_value_heads", wrong)
    model = tiny_model("llama")
    source, notes = rotated(model)
    assert "heads are not rotated" in notes[0]
    assert_same_output(model, loaded(source))


def test_an_outlier_channel_is_spread():
    def kurtosis(weight):
        return float(((weight - weight.mean()) / weight.std()).pow(4).mean())

    model = tiny_model("llama").requires_grad_(False)
    for norm in (model.model.layers[0].input_layernorm, model.model.layers[0].post_attention_layernorm):
        norm.weight.data[7] = 30.0
    for layer in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].mlp.gate_proj):
        layer.weight.data[:, 7] *= 20
    turned = loaded(rotated(model)[0])
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"):
        assert kurtosis(model.get_submodule(name).weight) > 20
        assert kurtosis(turned.get_submodule(name).weight) < 6


def test_a_seed_chooses_the_rotation():
    model = tiny_model("llama")
    first, again, other = (loaded(rotated(model, seed=seed)[0]).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.allclose(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("name", ["llama-fp16-tied", "mixtral", "gpt2"])
def test_any_part_is_loaded_as_in_the_whole(name, original):
    folder = open_source(original(name))
    source, _ = rotate(folder, describe(folder.skeleton()), Hadamard())
    whole, parts = loaded(source).state_dict(), source.skeleton()
    for key in sorted(whole, key=lambda key: key[::-1]):  # each tensor by itself, in some order
        source.load(parts, lambda name, key=key: name == key)
    assert all(torch.equal(whole[key], tensor) for key, tensor in parts.state_dict().items())
    source.unload(parts, "model.layers.0")
    source.load(parts)
    assert all(torch.equal(whole[key], tensor) for key, tensor in parts.state_dict().items())


W8 = {"format": "int8", "granularity": "channel", "scale_search": "absmax", "transforms": "hadamard"}


@pytest.mark.parametrize("name", ["llama-fp16-tied", "gpt2", "opt", "mpt", "cohere", "mamba", "lfm2", "mixtral"])
def test_it_is_written_with_a_head_of_its_own_and_loads(name, original, tmp_path):
    result = quantlab.quantize(original(name), W8, tmp_path / "out")
    model = load(name, result.folder)
    assert type(model).__name__ == MODELS[name].model
    assert not model.config.tie_word_embeddings
    assert not torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)
    folder = open_source(original(name))
    assert result.original_bytes == parameter_bytes(folder.skeleton())
    # What is loaded is the rotated model with the weights that its codes stand for.
    expected = loaded(rotate(folder, describe(folder.skeleton()), Hadamard())[0])
    for layer, weight in stored_weights(result.folder).items():
        set_weight(expected.get_submodule(layer), weight)
    scale = float(output(expected).abs().max())
    torch.testing.assert_close(output(model), output(expected), rtol=0, atol=2e-3 * scale)
    before = output(load(name, original(name)))
    assert float((output(model) - before).norm() / before.norm()) < 0.03


def test_a_layer_that_text_does_not_reach_is_refused():
    model = tiny_model("gpt2")
    config = copy.deepcopy(model.config)
    config.add_cross_attention = True  # reads what an encoder would say
    crossed = transformers.GPT2LMHeadModel(config).eval()
    with pytest.raises(
        PreflightError, match=r"transformer\.h\.0\.crossattention\.c_attn: .* text alone does not reach"
    ):
        rotated(crossed)


def test_a_quantized_head_and_a_model_in_memory(tmp_path):
    recipe = {**W8, "layers": {"lm_head": {"format": "int8"}}}
    model = tiny_model("llama-fp16-tied").float()
    state = copy.deepcopy(model.state_dict())
    result = quantlab.quantize(model, recipe, tmp_path / "out")
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert model.config.tie_word_embeddings
    assert result.reports[-1].layer == "lm_head"
    after = load("llama-fp16-tied", result.folder)
    assert float((output(after) - output(model)).norm() / output(model).norm()) < 0.02


class Stops(Silent):
    """Fails before the second block."""

    def block(self, name):
        if name == "model.layers.1":
            raise KeyboardInterrupt


def test_an_interrupted_run_ends_with_the_same_bytes(original, run):
    # The twin of a method that compares with the original model is rotated, too.
    changes = {"transforms": {"hadamard": {"seed": 3}}, "options": {"asym": 1.0}}
    with pytest.raises(KeyboardInterrupt):
        run(original("llama-fp16-tied"), changes, "one", progress=Stops())
    result = run(original("llama-fp16-tied"), changes, "one")
    assert result.resumed_blocks == 1
    straight = run(original("llama-fp16-tied"), changes, "other")
    files = sorted(file.name for file in straight.folder.iterdir())
    assert files == sorted(file.name for file in result.folder.iterdir())
    for file in files:
        assert (result.folder / file).read_bytes() == (straight.folder / file).read_bytes(), file
    before, after = (output(load("llama-fp16-tied", folder)) for folder in (original("llama-fp16-tied"), result.folder))
    assert float((before - after).norm() / before.norm()) < 0.4
    with pytest.raises(PreflightError, match="already holds"):
        run(original("llama-fp16-tied"), changes, "one")


def test_it_is_refused_before_anything_is_written(original, tmp_path):
    for transforms, error in [
        ("hadamrad", RecipeError),
        ({"hadamard": {"angle": 1}}, RecipeError),
        ("hadamard", PreflightError),
    ]:
        with pytest.raises(error):
            quantlab.quantize(original("bloom"), {**W8, "transforms": transforms}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_in_the_folder_says_it(original, tmp_path):
    result = quantlab.quantize(original("mixtral"), {**W8, "transforms": {"hadamard": {"seed": 5}}}, tmp_path / "out")
    assert quantlab.recipe.load_recipe(result.folder / "recipe.yaml").transforms == {"hadamard": {"seed": 5}}
    assert json.loads((result.folder / "config.json").read_text())["model_type"] == "mixtral"
