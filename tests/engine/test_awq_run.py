"""AWQ in whole runs: what is saved, what is reported, and the comparison with the original model."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny_model
from transformers import AutoModelForCausalLM

from quantlab.checkpoint.source import ModuleSource, open_source
from quantlab.engine import preflight
from quantlab.engine.architecture import describe, get_weight
from quantlab.engine.awq import Rescaling, draw_sample
from quantlab.engine.journal import Journal
from quantlab.engine.loop import Run
from quantlab.engine.observe import Calibration
from quantlab.errors import RecipeError
from quantlab.problem import LayerProblem
from quantlab.recipe import load_recipe
from quantlab.transforms import Awq, Reader

RTN = {"format": "int3", "granularity": 16, "quantizer": "rtn", "scale_search": "absmax", "scale_dtype": "float32"}
AWQ = {**RTN, "transforms": "awq"}


def outlier_model(name="llama"):
    """A tiny model in whose norms a few channels are far larger than the others."""
    model = tiny_model(name)
    for key, parameter in model.named_parameters():
        if "layernorm" in key:
            parameter.data[::13] *= 12
    return model


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()


def test_the_saved_model_is_the_one_in_memory_and_closer_than_without(run, tokens):
    model = outlier_model()
    expected = logits(model, tokens)
    errors = {}
    for name, recipe in (("rtn", RTN), ("awq", AWQ)):
        result = run(model, recipe, name)
        loaded = AutoModelForCausalLM.from_pretrained(result.folder).eval()
        errors[name] = float((logits(loaded, tokens) - expected).norm() / expected.norm())
        assert all(report.tokens == 0 and report.notes == () for report in result.reports)
    assert errors["awq"] < 0.8 * errors["rtn"]
    assert not torch.equal(loaded.model.layers[0].input_layernorm.weight, model.model.layers[0].input_layernorm.weight)
    source, decoded = ModuleSource(model), tiny_model("llama")  # what the run had in memory in the end
    decoded.load_state_dict(rounded_by_hand(source, tokens))
    torch.testing.assert_close(logits(loaded, tokens), logits(decoded, tokens), rtol=1e-3, atol=1e-4)


def rounded_by_hand(source, tokens):
    """The whole model folded block by block, then rounded."""
    recipe = load_recipe(AWQ)
    model = source.skeleton()
    source.load(model)
    architecture = describe(model)
    plan = preflight.plan(recipe, architecture, model)
    rescaling = Rescaling(Awq(), model, draw_sample(tokens, 512))
    with torch.no_grad(), Calibration(model, None, architecture, [tokens], [], rescaling.sample) as calibration:
        for block in architecture.blocks:
            ahead = calibration.look_ahead()
            rescaling.apply(block, ahead, [plan[name] for name in architecture.layers[block]])
            calibration.pass_through()
        for name, layer in plan.items():
            weight = get_weight(model.get_submodule(name))
            weight.copy_(
                layer.quantizer.quantize(LayerProblem(name, weight.clone()), layer.scheme).qtensor.dequantize()
            )
    return model.state_dict()


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "gemma2", "bart", "albert-groups"])
def test_the_sample_sees_the_original_model(name, tokens, tmp_path, monkeypatch):
    """Whatever became of the blocks before: each search is given the inputs of the original model."""
    seen = []

    def search(self, readers, channels, count):
        seen.extend(readers)
        return torch.full((count,), 2.0)

    monkeypatch.setattr(Awq, "search", search)
    source = ModuleSource(tiny_model(name))
    model, original = source.skeleton(), source.skeleton()
    source.load(original)
    inputs = {}
    architecture = describe(model)
    for layer in architecture.all_layers:
        original.get_submodule(layer).register_forward_pre_hook(
            lambda _, args, layer=layer: inputs.setdefault(layer, []).append(args[0].reshape(-1, args[0].shape[-1]))
        )
    decoder = {"decoder_input_ids": tokens} if original.config.is_encoder_decoder else {}
    with torch.no_grad():
        original(input_ids=tokens, **decoder)
    recipe = load_recipe(AWQ)
    journal = Journal(tmp_path / "out", {}, [*architecture.blocks, ""])
    run = Run(source, model, architecture, preflight.plan(recipe, architecture, model), [tokens[:, :8]], journal)
    run.rescaling = Rescaling(Awq(), model, tokens)
    run.execute()
    assert all(isinstance(reader, Reader) for reader in seen)
    assert len(seen) > 1
    known = [x for parts in inputs.values() for x in parts] + [torch.cat(parts) for parts in inputs.values()]
    for reader in seen:
        assert any(reader.x.shape == x.shape and torch.allclose(reader.x, x, rtol=1e-4, atol=1e-5) for x in known)


def test_the_original_model_is_compared_in_the_same_units(tokens):
    """A block that is only rescaled computes what it did: nothing has shifted."""
    source = ModuleSource(outlier_model())
    model, original = source.skeleton(), source.skeleton()
    source.load(model)
    source.load(original)
    architecture = describe(model)
    recipe = load_recipe({**AWQ, "quantizer": "gptq", "options": {"asym": 1.0}})
    plan = preflight.plan(recipe, architecture, model)
    rescaling, shifts, scaled = Rescaling(Awq(), model, tokens), {}, 0
    batches = list(tokens.split(1))
    with torch.no_grad(), Calibration(model, original, architecture, batches, [], tokens) as calibration:
        for block in architecture.blocks:
            planned = [plan[name] for name in architecture.layers[block]]
            rescaled = rescaling.apply(block, calibration.look_ahead(), planned)
            scaled += len(rescaled.divisors)
            for group, statistics in calibration.observe(planned, last=False, divisors=rescaled.divisors):
                size = statistics.second_moment.abs().max()
                shifts[group[0].name] = float(statistics.shift.abs().max() / size)
    assert scaled > 7
    assert len(shifts) == 8
    assert max(shifts.values()) < 1e-5


@pytest.mark.parametrize(
    "changes", [{"options": {"asym": 1.0}}, {"options": {"order": "natural"}}], ids=["asym", "gptq"]
)
def test_gptq_rounds_what_was_rescaled(changes, run, tokens):
    model = outlier_model()
    expected = logits(model, tokens)
    result, rounded = run(model, {**AWQ, "quantizer": "gptq", **changes}), run(model, AWQ, "rounded")
    assert {report.tokens for report in result.reports} == {tokens.numel()}
    gptq, rtn = (AutoModelForCausalLM.from_pretrained(result.folder).eval() for result in (result, rounded))
    assert float((logits(gptq, tokens) - expected).norm()) < 0.95 * float((logits(rtn, tokens) - expected).norm())


def test_layers_that_cannot_be_rescaled_say_so(run, original):
    reports = {report.layer.split("layers.")[-1]: report for report in run(original("olmo2"), AWQ).reports}
    alone = {name for name, report in reports.items() if report.notes == ("awq: its input cannot be rescaled",)}
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    assert alone == {f"{block}.{name}" for block in range(2) for name in projections}
    assert reports["0.self_attn.o_proj"].notes == ()


def test_experts_that_no_token_reaches_say_so(run, original):
    one = torch.full((1, 4), 7)
    reports = run(original("mixtral"), AWQ, calibration=one).reports
    missed = {report.layer for report in reports if "awq: no token of the sample reached it" in report.notes}
    assert missed
    assert all("experts" in name and name.endswith("down_proj") for name in missed)


def test_a_block_that_cannot_be_tried_is_left_alone(run, original, monkeypatch):
    def fails(*_):
        raise ValueError("no\nway")

    monkeypatch.setattr("quantlab.engine.awq.find_pairs", fails)
    result, plain = run(original("llama"), AWQ), run(original("llama"), RTN, "plain")
    assert {report.notes for report in result.reports} == {
        ("awq: its block cannot be tried out by itself (ValueError: no way)",)
    }
    assert [report.error for report in result.reports] == [report.error for report in plain.reports]


def test_only_what_is_quantized_is_searched_and_all_are_folded(run, original, monkeypatch):
    found = []
    search = Awq.search
    monkeypatch.setattr(Awq, "search", lambda *args: found.append(len(args[1])) or search(*args))
    result = run(original("llama"), {**AWQ, "layers": {"*.k_proj": {"format": "none"}, "*.mlp.*": {"format": "none"}}})
    assert found == [2, 1] * 2  # queries and values; the output of attention
    assert len(result.reports) == 6


def test_the_source_is_left_as_it_was(run, tokens):
    model = outlier_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(model, AWQ)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_unknown_transform_is_refused_before_any_work(run, original, tmp_path):
    with pytest.raises(RecipeError, match="transform 'awk' is unknown"):
        run(original("llama"), {"transforms": "awk"})
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("shape", "count", "expected"), [((64, 512), 512, (2, 256)), ((3, 100), 512, (3, 100)), ((5, 40), 16, (1, 16))]
)
def test_the_sample_comes_from_all_over(shape, count, expected):
    tokens = torch.arange(shape[0] * shape[1]).view(shape)
    sample = draw_sample(tokens, count)
    assert sample.shape == expected
    assert sample[0, 0] == 0
    assert sample[-1, 0] >= tokens[shape[0] // 2, 0] or len(sample) == 1


def test_a_folder_gives_what_the_model_in_memory_gives(run, original):
    in_memory = open_source(original("llama"))
    assert in_memory.folder == original("llama")
    first, second = run(original("llama"), AWQ, "first"), run(tiny_model("llama"), AWQ, "second")
    assert [report.record() for report in first.reports] == [report.record() for report in second.reports]
