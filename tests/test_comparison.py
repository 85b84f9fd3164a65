"""Ways to quantize compared: figures against a naive computation, one pass, what is skipped, what is chosen."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from pretend_device import NAME, PretendDevice
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

import quantlab
from quantlab.comparison import Comparison, LayerComparison, VariantComparison
from quantlab.compensation.base import COMPENSATIONS, register
from quantlab.engine import preflight, survey
from quantlab.engine.statistics import InputAccumulator
from quantlab.errors import PreflightError, RecipeError
from quantlab.numerics import QTensor
from quantlab.problem import InputStatistics, LayerProblem, Solution, Statistic
from quantlab.quantizers import make_quantizer
from quantlab.recipe import Scheme
from quantlab.variants import Variant

RECIPE = {"granularity": 16, "scale_dtype": "float32"}
BLOCK = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 96, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def compare(model, tokens):
    def run(grid, **kwargs):
        return quantlab.compare(model, grid, **{"recipe": RECIPE, "calibration": tokens, **kwargs})

    return run


@pytest.mark.usefixtures("in_torch")
@pytest.mark.parametrize("grid", ["formats=int4,nf4 quantizers=rtn,gptq", "formats=int4 compensation=none,lorc:4"])
def test_on_a_device(compare, grid):
    """The same figures, all computed there; and nothing is left."""
    with sdpa_kernel(SDPBackend.MATH):
        expected = compare(grid, blocks=2)
        with PretendDevice() as device:
            found = compare(grid, blocks=2, device=NAME)
            assert device.held() == 0
    assert device.work > 64 * 64
    assert device.work_on_cpu == 0
    assert (found.device, expected.device) == ("lazy", "cpu")
    for ours, theirs in zip(found.variants, expected.variants, strict=True):
        for layer, same in zip(ours.layers, theirs.layers, strict=True):
            assert layer.bytes == same.bytes
            assert layer.output_error == pytest.approx(same.output_error, rel=1e-4)
            assert layer.weight_error == pytest.approx(same.weight_error, rel=1e-4)
    assert Comparison.from_dict(json.loads(json.dumps(found.to_dict()))).device == "lazy"


def test_too_small_a_device(compare, monkeypatch):
    monkeypatch.setattr(preflight, "free_bytes", lambda _: 10_000)
    with PretendDevice() as device, pytest.raises(PreflightError, match="GB are free there"):
        compare("formats=int4", device=NAME, outputs=True)
    assert device.work == 0


@pytest.fixture
def half(monkeypatch):
    """A repair that forgets half of the error's first column, and refuses formats of 2 bits."""
    monkeypatch.setattr(COMPENSATIONS, "_classes", dict(COMPENSATIONS._classes))

    @register("half")
    @dataclass(frozen=True)
    class Half:
        strength: float = 0.5

        name: ClassVar[str]

        def needs(self, scheme):
            if scheme.bits == 2:
                raise RecipeError("half: 2 bits are too few")
            return Statistic.MEAN

        def solve(self, problem, scheme, rounding):
            if scheme.bits == 3 and "down_proj" in problem.name:
                raise RecipeError(f"{problem.name}: cannot be halved")
            assert problem.statistics.mean is not None
            solution = rounding.quantize(problem, scheme)
            return Solution(replace(solution.qtensor, scales=solution.qtensor.scales * (1 - self.strength)))


def naive(model, tokens, name, scheme):
    """A layer's errors by the definition: plain forwards of the original, everything else written out."""
    seen = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        model(input_ids=tokens)
    handle.remove()
    x, weight = torch.cat(seen), layer.weight.detach()
    moment = x.T @ x / len(x)
    statistics = InputStatistics(len(x), moment, moment.diagonal())
    method = make_quantizer(scheme.quantizer, scheme.options)
    qtensor: QTensor = method.quantize(LayerProblem(name, weight, statistics), scheme).qtensor
    error = weight - qtensor.dequantize()
    of_weight = error.square().sum() / weight.square().sum()
    of_output = (x @ error.T).square().sum() / (x @ weight.T).square().sum()
    return float(of_weight), float(of_output), qtensor.bits_per_weight()


def test_errors_are_those_of_the_definition(compare, model, tokens):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = compare(
        "formats=int3,nf4 quantizers=rtn,gptq(order=natural) groups=16,channel", layers=["*.3.*", "*.1.*.o_proj"]
    )
    assert len(found.variants) == 8
    assert found.layers[0] == "model.layers.1.self_attn.o_proj"
    for entry in found.variants:
        assert len(entry.layers) == 8
        for layer in entry.layers[::3]:
            weight, output, bits = naive(model, tokens, layer.layer, entry.variant.scheme)
            assert layer.weight_error == pytest.approx(weight, rel=1e-3)
            assert layer.output_error == pytest.approx(output, rel=1e-3)
            assert layer.bits == pytest.approx(bits)
            assert layer.tokens == tokens.numel()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_statistics_are_taken_once_and_no_further_than_needed(compare, monkeypatch):
    finished, blocks = [], []
    finish, advance = InputAccumulator.finish, survey.Survey._load
    monkeypatch.setattr(InputAccumulator, "finish", lambda self: finished.append(self) or finish(self))
    monkeypatch.setattr(survey.Survey, "_load", lambda self, place: blocks.append(place) or advance(self, place))
    found = compare("formats=int2,int3,int4 quantizers=rtn,gptq groups=16,channel", layers=["*.layers.2.*"])
    assert len(found.variants) == 12
    assert len(finished) == 4  # qkv, o, gate and up, down
    assert {statistics.tokens for statistics in finished} == {8 * 32}
    assert blocks == ["", "model.layers.0", "model.layers.1", "model.layers.2"]


def test_progress_is_told_of_every_layer_and_variant(compare):
    told = []

    class Progress:
        def start(self, start):
            told.append((len(start.plan), start.variants, len(start.architecture.blocks)))

        def block(self, name):
            pass

        def layer(self, report):
            told.append((report.layer, report.quantizer))

        def finish(self):
            told.append("finished")

    compare("quantizers=rtn,gptq", layers=["*.layers.1.mlp.*"], progress=Progress())
    assert told[0] == (3, 2, 2)
    assert len(told) == 1 + 6 + 1
    assert len(set(told)) == len(told)
    assert told[-1] == "finished"


def test_without_inputs_no_forward_is_made(compare, model, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda *_, **__: pytest.fail("the model ran"))
    found = compare("search=mse,absmax", layers=["*.o_proj"], calibration=None)
    assert found.calibration == {}
    assert all(entry.output_error is None and entry.error == entry.weight_error.mean for entry in found.variants)
    assert found.variants[0].weight_error.mean < found.variants[1].weight_error.mean


def test_outputs_can_be_asked_for(compare):
    found = compare("search=mse", layers=["*.1.*.o_proj", "lm_head"], outputs=True)
    assert found.layers[-1] == "lm_head"
    assert all(layer.output_error > 0 and layer.tokens == 256 for layer in found.variants[0].layers)


def test_what_cannot_be_carried_out_is_skipped_with_the_reason(compare, half):
    found = compare("formats=int4,int3,int2 compensation=none,half:0.25 groups=16,64", layers=["*.0.*"])
    reasons = {entry.variant.name: entry.reason for entry in found.skipped}
    assert len(reasons) == 8
    assert reasons["int4/64 rtn"] == "model.layers.0.mlp.down_proj: in_features 96 is not divisible by group size 64"
    assert reasons["int2/16 rtn + half(strength=0.25)"] == "half: 2 bits are too few"
    assert reasons["int3/16 rtn + half(strength=0.25)"] == "model.layers.0.mlp.down_proj: cannot be halved"
    names = [entry.variant.name for entry in found.variants]
    assert names == ["int4/16 rtn", "int4/16 rtn + half(strength=0.25)", "int3/16 rtn", "int2/16 rtn"]
    plain, halved = found.variants[:2]
    assert halved.weight_error.mean > 5 * plain.weight_error.mean
    with pytest.raises(PreflightError, match=r"none of the grid's 2 combinations .* group size 64"):
        compare("groups=64,48")
    with pytest.raises(PreflightError, match="cannot be halved"):
        compare("formats=int3 compensation=half", layers=["*.0.*"])


def test_layers_are_a_spread_sample_or_what_patterns_say(compare):
    def layers(**kwargs):
        return list(compare("search=mse", calibration=None, **kwargs).layers)

    def blocks(names):
        return list(dict.fromkeys(int(name.split(".")[2]) for name in names))

    assert blocks(layers()) == [0, 1, 3, 4]
    assert [name.split(".")[-1] for name in layers(blocks=1)] == BLOCK
    assert blocks(layers(blocks=1)) == [2]
    assert blocks(layers(blocks=2)) == [1, 3]
    assert len(layers(blocks=None)) == len(layers(blocks=9)) == 35
    assert layers(layers=["*.1.mlp.*", "re:.*[02].*q_proj"])[0] == "model.layers.0.self_attn.q_proj"
    with pytest.raises(RecipeError, match=r"nearest are .*down_proj"):
        layers(layers=["*.down_porj"])
    with pytest.raises(RecipeError, match="layers is empty"):
        layers(layers=[])
    with pytest.raises(PreflightError, match="blocks 0"):
        layers(blocks=0)
    assert "4 of 5 blocks" in compare("search=mse").selection


def test_recipes_that_do_more_than_a_scheme(compare):
    found = compare("formats=int4", recipe={**RECIPE, "layers": {"*.o_proj": {"format": "int8"}}}, blocks=1)
    assert all(layer.bits < 7 for layer in found.variants[0].layers)
    assert found.notes == ("the recipe's exceptions for *.o_proj are not applied",)
    with pytest.raises(RecipeError, match="--set transforms=none"):
        compare("formats=int4", recipe={**RECIPE, "transforms": "awq"})
    found = compare("quantizers=gptq(asym=1.0),gptq", blocks=1)
    assert found.variants[0].weight_error == found.variants[1].weight_error
    assert "asym has no effect" in found.notes[0]


def test_json_and_back(compare, half):
    found = compare("formats=int4,int2 compensation=none,half", layers=["*.down_proj"])
    document = json.loads(json.dumps(found.to_dict()))
    assert Comparison.from_dict(document) == found
    assert [entry["front"] for entry in document["variants"]] == [True, False, True]
    assert document["variants"][0]["output_error"]["mean"] == found.variants[0].output_error.mean


def layer(weights, error, bits=4):
    return LayerComparison("layer", (weights, 1), bits, weights * bits // 8, error, None, 0, 0.0)


def compared(name, *layers):
    return VariantComparison(Variant(name, Scheme()), layers)


def test_layers_count_by_their_weights():
    entry = compared("a", layer(800, 0.1), layer(100, 0.5), layer(300, 0.3, bits=8))
    assert entry.weight_error.mean == pytest.approx((80 + 50 + 90) / 1200)
    assert entry.weight_error.median == 0.1
    assert entry.bits == pytest.approx(5)
    assert compared("b", layer(2, 0.1), layer(2, 0.2), layer(2, 0.3)).weight_error.median == 0.2


def test_the_front_is_what_nothing_beats():
    entries = [
        compared("4 good", layer(8, 0.1)),
        compared("8 no better", layer(8, 0.1, bits=8)),
        compared("4 bad", layer(8, 0.2)),
        compared("2", layer(8, 0.5, bits=2)),
        compared("8", layer(8, 0.01, bits=8)),
    ]
    found = Comparison("model", "recipe", "", tuple(entries), (), {}, (), 0.0)
    assert [entry.variant.name for entry in found.front()] == ["2", "4 good", "8"]
