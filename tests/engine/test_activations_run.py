"""Schemes whose activations are rounded to 8 bits, from recipe to folder and back."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from quantlab_kernels import rounded

import quantlab
from quantlab.checkpoint.quantized import QuantizedFolder
from quantlab.engine.journal import LOG
from quantlab.engine.progress import Silent
from quantlab.errors import RecipeError
from quantlab.nn import QuantLinear
from quantlab.recipe import Scheme, load_recipe

W8A8 = {"format": "int8", "granularity": "channel", "activations": "int8"}
FP8 = {"format": "e4m3", "granularity": "channel", "activations": "fp8"}


def without(recipe):
    return recipe | {"activations": "none"}


class TestTheRecipe:
    @pytest.mark.parametrize("value", ["int4", "e4m3", True, None, 8])
    def test_other_values_are_refused(self, value):
        with pytest.raises(RecipeError, match="use one of none, int8, fp8"):
            Scheme(activations=value)

    def test_it_is_set_by_pattern_and_from_outside(self):
        recipe = load_recipe("w8a8", ["layers={'*.o_proj': {activations: none}}"])
        assert recipe.scheme("a.q_proj").activations == "int8"
        assert recipe.scheme("a.o_proj").activations == "none"
        assert load_recipe("w8-rtn", ["activations=int8"]).default == load_recipe("w8a8").default

    @pytest.mark.parametrize(
        ("changes", "remedy"),
        [
            ({"granularity": 16}, "granularity channel"),
            ({"format": "nf4"}, "int8"),
            ({"format": "codebook4"}, "int8"),
            ({"symmetric": False}, "symmetric: true"),
            ({"format": "e4m3"}, "int8"),
            ({"format": "int8", "activations": "fp8"}, "format e4m3"),
            ({"format": "e5m2", "activations": "fp8"}, "format e4m3"),
        ],
    )
    def test_a_weight_that_does_not_go_with_it_names_layer_value_and_remedy(self, original, run, changes, remedy):
        with pytest.raises(RecipeError) as caught:
            run(original("llama"), W8A8 | {"layers": {"*.1.mlp.down_proj": changes}})
        message = str(caught.value)
        assert message.startswith("model.layers.1.mlp.down_proj: activations ")
        assert remedy in message
        assert "activations: none" in message

    def test_an_embedding_has_none(self, original, run):
        embedded = {"layers": {"model.embed_tokens": {"format": "int8"}, "lm_head": {"format": "int8"}}}
        with pytest.raises(RecipeError, match=r"model\.embed_tokens: activations int8: an embedding"):
            run(original("llama"), W8A8 | embedded)

    def test_layers_that_stay_as_they_are_are_not_asked(self, original, run):
        assert run(original("llama"), W8A8 | {"layers": {"*.mlp.*": {"format": "none"}}})


@pytest.mark.parametrize("recipe", [W8A8, FP8], ids=["int8", "fp8"])
def test_what_is_stored_is_what_runs(original, run, recipe, tmp_path):
    result = run(original("llama"), recipe)
    plain = run(original("llama"), without(recipe), "plain")
    assert result.bits == plain.bits  # nothing is stored for it
    model = quantlab.load(result.folder, dtype=torch.float32)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert {layer.activations for layer in layers} == {recipe["activations"]}
    layer = layers[0]
    x = torch.randn(5, layer.in_features)
    expected = rounded(x, recipe["activations"]) @ layer.to_qtensor().dequantize().T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert {layer.activations for layer in quantlab.inspect(result.folder).layers} == {recipe["activations"]}
    assert yaml.safe_load((result.folder / "recipe.yaml").read_text())["activations"] == recipe["activations"]
    model.save_pretrained(tmp_path / "again")
    again = quantlab.load(tmp_path / "again", dtype=torch.float32)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert not torch.equal(quantlab.load(plain.folder, dtype=torch.float32)(ids).logits, model(ids).logits)


@torch.no_grad()
def test_later_layers_see_activations_as_earlier_layers_round_them(original, run, tokens):
    """The error of a layer in the second block, from inputs that an independent model makes."""
    result = run(original("llama"), W8A8)
    name = "model.layers.1.self_attn.q_proj"
    (report,) = [report for report in result.reports if report.layer == name]
    folder = QuantizedFolder(result.folder)
    model = quantlab.load(original("llama"))
    weight = model.get_submodule(name).weight.double()
    for layer in folder.layers:
        if layer.startswith("model.layers.0."):
            module = model.get_submodule(layer)
            module.weight.copy_(folder.layer(layer).dequantize())
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0], "int8"),))
    seen = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(tokens)
    x = seen[0].reshape(-1, weight.shape[1]).double()
    off = folder.layer(name).dequantize().double() - weight
    expected = (x @ off.T).square().sum() / (x @ weight.T).square().sum()
    assert report.error == pytest.approx(float(expected), rel=2e-3)
    plain = run(original("llama"), without(W8A8), "plain")
    errors = {report.layer: report.error for report in plain.reports}
    assert report.error != pytest.approx(errors[name], rel=1e-7)
    first = result.reports[0]
    assert first.error == errors[first.layer]  # its own rounding is not in it


class Stops(Silent):
    """Stops a run before the second block."""

    def __init__(self):
        self.blocks = 0

    def block(self, name):
        self.blocks += bool(name)
        if self.blocks == 2:
            raise KeyboardInterrupt


def test_an_interrupted_run_ends_with_the_same_bytes(original, run):
    whole = run(original("llama"), W8A8)
    with pytest.raises(KeyboardInterrupt):
        run(original("llama"), W8A8, "again", progress=Stops())
    again = run(original("llama"), W8A8, "again")
    assert again.resumed_blocks == 1
    files = sorted(path.name for path in whole.folder.iterdir())
    assert files == sorted(path.name for path in again.folder.iterdir())
    for name in files:
        assert (whole.folder / name).read_bytes() == (again.folder / name).read_bytes(), name
    records = [json.loads(line) for line in (again.folder / LOG).read_text().splitlines()]
    assert {record["activations"] for record in records if record["kind"] == "layer"} == {"int8"}
