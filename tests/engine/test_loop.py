"""The engine against a naive one written here: a whole forward of the whole model for every group of layers."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny_model

from quantlab.checkpoint.native import read_layer
from quantlab.checkpoint.source import ModuleSource, open_source
from quantlab.engine import observe, preflight
from quantlab.engine import statistics as statistics_of
from quantlab.engine.architecture import describe, get_weight, set_weight
from quantlab.engine.journal import Journal
from quantlab.engine.loop import Run
from quantlab.engine.observe import Calibration
from quantlab.engine.progress import Start
from quantlab.engine.report import LayerReport
from quantlab.engine.statistics import InputAccumulator
from quantlab.errors import QuantlabError
from quantlab.numerics import QTensor
from quantlab.problem import InputStatistics, LayerProblem, Statistic
from quantlab.recipe import load_recipe
from quantlab.storage import Storage

# In the order of the forward pass.
GROUPS = [
    [f"model.layers.{block}.{name}" for name in group]
    for block in range(2)
    for group in (
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    )
] + [["lm_head"]]


def recipe(**changes):
    return load_recipe(
        {
            "format": "int3",
            "granularity": 16,
            "quantizer": "gptq",
            "scale_dtype": "float32",
            "layers": {"lm_head": {"format": "int4"}},
            **changes,
        }
    )


def batches_of(tokens):
    return list(tokens.split(3))  # 3 + 3 + 2 sequences


def inputs_of(model, layer, batches):
    """What a layer is given, float32 ``[tokens, in]``, by a hook on a plain forward."""
    seen = []
    module = model.get_submodule(layer)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
    handle.remove()
    return torch.cat(seen).float()


def naive(chosen, tokens):
    """Quantize a Llama: for each group of layers run everything again. Returns each layer's QTensor."""
    model, plan = tiny_model("llama"), {}
    with torch.no_grad():
        plan = preflight.plan(chosen, describe(model), model)
        answers = {}
        for group in GROUPS:
            x = inputs_of(model, group[0], batches_of(tokens))
            moment = x.T @ x / len(x)
            statistics = InputStatistics(len(x), moment, moment.diagonal())
            for layer in group:
                module = model.get_submodule(layer)
                problem = LayerProblem(layer, get_weight(module).float(), statistics)
                answers[layer] = plan[layer].quantizer.quantize(problem, plan[layer].scheme).qtensor
            for layer in group:
                set_weight(model.get_submodule(layer), answers[layer].dequantize())
    return answers


def engine(chosen, tokens, folder, name="llama", progress=None):
    """The same by the engine. Returns each layer's QTensor and report."""
    source = ModuleSource(tiny_model(name))
    model = source.skeleton()
    architecture = describe(model)
    plan = preflight.plan(chosen, architecture, model)
    journal = Journal(folder, {}, [*architecture.blocks, ""])
    run = Run(source, model, architecture, plan, batches_of(tokens), journal)
    if progress is not None:
        run.progress = progress
    run.execute()
    answers: dict[str, QTensor] = {}
    for block in (*architecture.blocks, ""):
        answers |= journal.read(block)[0]
    return answers, {report.layer: report for report in journal.reports}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"options": {"order": "natural"}, "scale_search": "absmax"},
        {"granularity": "channel", "symmetric": False},
        {"quantizer": "rtn", "scale_search": "second-moment"},
    ],
    ids=["gptq", "natural", "channel", "rtn"],
)
def test_gives_what_running_everything_again_gives(changes, tokens, tmp_path):
    chosen = recipe(**changes)
    expected = naive(chosen, tokens)
    actual, reports = engine(chosen, tokens, tmp_path / "out")
    assert set(actual) == set(expected) == {layer for group in GROUPS for layer in group}
    for layer, qtensor in expected.items():
        # Sums over tokens run in another order, so a weight in the middle of two codes may fall to either side.
        same = (actual[layer].codes == qtensor.codes).float().mean()
        assert same > 0.998, layer
        torch.testing.assert_close(actual[layer].scales, qtensor.scales, rtol=2e-2, atol=0)
        assert reports[layer].tokens == tokens.numel()


def test_the_reported_error_is_that_of_the_layers_output(tokens, tmp_path):
    chosen = recipe()
    answers, reports = engine(chosen, tokens, tmp_path / "out")
    model = tiny_model("llama")
    for group in GROUPS:
        x = inputs_of(model, group[0], batches_of(tokens)).double()
        for layer in group:
            weight = get_weight(model.get_submodule(layer)).double()
            change = x @ (weight - answers[layer].dequantize().double()).T
            expected = float(change.square().sum() / (x @ weight.T).square().sum())
            assert reports[layer].metric == "output"
            assert reports[layer].error == pytest.approx(expected, rel=1e-3), layer
        for layer in group:
            set_weight(model.get_submodule(layer), answers[layer].dequantize())


def observed(chosen, batches, name="llama"):
    """Each group's statistics as the engine sees them; groups are solved by rounding in between."""
    source = ModuleSource(tiny_model(name))
    model, original = source.skeleton(), source.skeleton()
    source.load(model)
    source.load(original)
    architecture = describe(model)
    plan = preflight.plan(chosen, architecture, model)
    found = {}
    with torch.no_grad(), Calibration(model, original, architecture, batches, ["lm_head"]) as calibration:
        for block in (*architecture.blocks, ""):
            names = architecture.layers[block] if block else architecture.outside
            for group, statistics in calibration.observe([plan[name] for name in names], last=not block):
                found[group[0].name] = statistics
                for layer in group:
                    set_weight(model.get_submodule(layer.name), rounded(model, layer.name))
    return found


def rounded(model, layer):
    weight = get_weight(model.get_submodule(layer))
    return (weight / 0.05).round() * 0.05


def test_the_shift_compares_with_the_original_model(tokens):
    batches = list(tokens.split(1))
    compared, held_out = observe._comparison(len(batches))
    assert set(held_out) < set(compared) < set(range(len(batches)))
    parts = {
        "shift": [batches[index] for index in compared],
        "held_out_shift": [batches[index] for index in held_out],
    }
    assert all(parts.values())
    found = observed(recipe(options={"asym": 1.0}), batches)
    assert list(found) == [group[0] for group in GROUPS]
    model, original = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        for group in GROUPS:
            statistics = found[group[0]]
            x = inputs_of(model, group[0], batches)
            assert statistics.tokens == len(x)
            assert statistics.held_out == pytest.approx(len(held_out) / len(compared))
            torch.testing.assert_close(statistics.second_moment, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
            for attribute, part in parts.items():
                x = inputs_of(model, group[0], part)[:: statistics_of._COMPARED]
                x_o = inputs_of(original, group[0], part)[:: statistics_of._COMPARED]
                expected = (x_o - x).T @ x / len(x)
                torch.testing.assert_close(getattr(statistics, attribute), expected, rtol=1e-3, atol=1e-5)
            for layer in group:
                set_weight(model.get_submodule(layer), rounded(model, layer))
    assert float(found[GROUPS[0][0]].shift.abs().max()) == 0
    assert float(found["lm_head"].shift.abs().max()) > 1e-3


def test_asym_runs_with_experts_and_encoders(original, run):
    for name in ("mixtral", "deepseek-v3", "bart", "albert"):
        result = run(original(name), {"options": {"asym": 0.5}}, name)
        assert all(report.tokens > 0 for report in result.reports)


@pytest.mark.parametrize("shape", [(4, 700, 96), (3, 1000, 260)])
def test_second_moments_of_16_bits_are_exact_to_their_rounding(shape):
    generator = torch.Generator().manual_seed(0)
    outliers = torch.ones(shape[-1])
    outliers[:4] = 50
    x = (torch.randn(shape, generator=generator) * outliers).bfloat16()
    accumulator = InputAccumulator(Statistic.SECOND_MOMENT | Statistic.DIAGONAL, shape[-1])
    for part in x:
        accumulator.add(part)
    statistics = accumulator.finish()
    rows = x.reshape(-1, shape[-1]).double()
    expected = rows.T @ rows / len(rows)
    assert statistics.tokens == len(rows)
    assert torch.equal(statistics.second_moment, statistics.second_moment.T)
    assert torch.equal(statistics.diagonal, statistics.second_moment.diagonal())
    # Each product of some hundred tokens is rounded to bfloat16, once: 2^-9 of its own size.
    size = expected.diagonal().sqrt()
    error = (statistics.second_moment - expected).abs() / (size[:, None] * size)
    assert float(error.max()) < 2**-8
    assert float(error.mean()) < 2**-12


def test_second_moments_of_32_bits_are_float32():
    x = torch.randn(5, 300, 64, generator=torch.Generator().manual_seed(0))
    accumulator = InputAccumulator(Statistic.SECOND_MOMENT, 64)
    for part in x:
        accumulator.add(part)
    rows = x.reshape(-1, 64).double()
    torch.testing.assert_close(
        accumulator.finish().second_moment, (rows.T @ rows / len(rows)).float(), rtol=1e-5, atol=1e-6
    )


class Recorder:
    """A progress that writes down what it is told."""

    def __init__(self):
        self.told = []

    def start(self, start):
        self.told.append(start)

    def block(self, name):
        self.told.append(name)

    def layer(self, report):
        self.told.append(report)

    def finish(self):
        self.told.append("finish")


def test_progress_is_told_everything_and_changes_nothing(original, run):
    recorder = Recorder()
    first = run(original("llama"), out="first", progress=recorder)
    second = run(original("llama"), out="second")
    start, *told, last = recorder.told
    assert isinstance(start, Start)
    assert (start.resumed, last) == ((), "finish")
    assert [entry for entry in told if isinstance(entry, str)] == ["", "model.layers.0", "model.layers.1"]
    assert [entry for entry in told if isinstance(entry, LayerReport)] == list(first.reports)
    assert {file.name for file in first.folder.iterdir()} == {file.name for file in second.folder.iterdir()}
    for file in first.folder.iterdir():
        assert file.read_bytes() == (second.folder / file.name).read_bytes(), file.name


def test_batches_do_not_change_what_is_seen(original, tokens, tmp_path):
    """One batch of everything and many small ones: equal up to the order of sums."""
    chosen = recipe()
    many, _ = engine(chosen, tokens, tmp_path / "many")
    source = open_source(original("llama"))
    model = source.skeleton()
    architecture = describe(model)
    journal = Journal(tmp_path / "one", {}, [*architecture.blocks, ""])
    plan = preflight.plan(chosen, architecture, model)
    Run(source, model, architecture, plan, [tokens], journal).execute()
    one = journal.read("model.layers.1")[0]
    for layer, qtensor in one.items():
        assert (qtensor.codes == many[layer].codes).float().mean() > 0.998


def test_the_skeleton_is_empty_when_the_run_is_over(tokens, tmp_path):
    source = ModuleSource(tiny_model("mixtral"))
    model = source.skeleton()
    architecture = describe(model)
    chosen = recipe(layers={})
    journal = Journal(tmp_path / "out", {}, [*architecture.blocks, ""])
    Run(source, model, architecture, preflight.plan(chosen, architecture, model), [tokens], journal).execute()
    real = [name for name, p in model.named_parameters() if not p.is_meta and architecture.block_of(name)]
    assert real == []
    assert not any(module._forward_pre_hooks for module in model.modules())
    tensors = journal.writer.read("model-00001-of-00003.safetensors")
    report = journal.reports[0]
    storage = Storage.from_dict(journal.storages[report.layer].to_dict())
    assert read_layer(tensors, report.layer, storage).shape == report.shape


@pytest.mark.timeout(30)
@pytest.mark.parametrize("changes", [{}, {"quantizer": "rtn"}, {"quantizer": "rtn", "scale_search": "absmax"}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(value, changes, run):
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[3, 3] = value
    with pytest.raises(QuantlabError, match=r"model\.layers\.0\.mlp\.up_proj: its weight holds NaN or infinity"):
        run(model, changes)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("changes", [{}, {"quantizer": "rtn"}])
def test_inputs_that_overflow_are_refused_by_name(changes, run):
    model = tiny_model("llama").half()
    model.model.layers[0].mlp.up_proj.weight.data *= 1e4
    model.model.layers[0].mlp.gate_proj.weight.data *= 1e4
    with pytest.raises(QuantlabError, match=r"model\.layers\.0\.mlp\.down_proj: .* not finite.*float16"):
        run(model, changes)


@pytest.mark.parametrize("batches", range(40))
def test_the_comparison_always_has_something_to_judge_it_by(batches):
    compared, held_out = observe._comparison(batches)
    assert bool(compared) == bool(held_out) == (batches > 1)
    assert set(held_out) <= set(compared) <= set(range(batches))
    assert not compared or len(held_out) <= max(1, len(compared) / 3)


def test_one_batch_alone_moves_no_target(tokens, tmp_path):
    one = tokens[:1]
    plain, _ = engine(recipe(options={"asym": 0.0}), one, tmp_path / "plain")
    moved, _ = engine(recipe(options={"asym": 1.0}), one, tmp_path / "moved")
    for layer, qtensor in plain.items():
        assert torch.equal(qtensor.codes, moved[layer].codes)
