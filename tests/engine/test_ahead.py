"""What is settled before the run: network-wide tables and shared budgets."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny_model
from test_resume import at, files, killed

import quantlab
from quantlab.checkpoint.source import ModuleSource
from quantlab.engine import ahead, preflight
from quantlab.engine.ahead import look_ahead
from quantlab.engine.architecture import describe, get_weight
from quantlab.errors import CheckpointError
from quantlab.numerics import Sample, format_called
from quantlab.recipe import load_recipe

BUDGET = {"compensation": "lorc", "compensation_options": {"rank": 16, "dtype": "int8", "budget": 0.7}}
NETWORK = {"format": "power4:network", "quantizer": "rtn"}


def settle(changes, name="llama", model=None):
    source = ModuleSource(model or tiny_model(name))
    skeleton = source.skeleton()
    architecture = describe(skeleton)
    plan = preflight.plan(load_recipe({"granularity": 16, **changes}), architecture, skeleton)
    settled = look_ahead(plan, source, skeleton, architecture)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert list(settled) == list(plan)
    return plan, settled


def test_nothing_is_read_where_nothing_is_shared(monkeypatch):
    monkeypatch.setattr(ModuleSource, "load", lambda *_: pytest.fail("weights were read"))
    plan, settled = settle({"format": "power4", "compensation": "lorc"})
    assert settled == plan


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "llama-fp16-tied"])
def test_a_network_has_one_table_that_fits_all_its_layers(name):
    _, settled = settle({**NETWORK, "granularity": "channel"}, name)
    (found,) = {layer.scheme.format for layer in settled.values()}
    model = ModuleSource(tiny_model(name))
    skeleton = model.skeleton()
    model.load(skeleton)
    samples = [Sample(get_weight(skeleton.get_submodule(layer)).float(), "channel") for layer in settled]
    assert found == format_called("power4:network").fit(samples).name
    assert format_called(found).grid is not None


def test_two_networks_in_one_model():
    """Layers of other formats are left alone, and each format is fitted to its own layers."""
    layers = {"*.mlp.*": {"format": "power3:network"}, "*.q_proj": {"format": "int4"}}
    _, settled = settle({**NETWORK, "layers": layers})
    formats = {name: layer.scheme.format for name, layer in settled.items()}
    assert {fmt.split(":")[0] for fmt in formats.values()} == {"power4", "power3", "int4"}
    assert len(set(formats.values())) == 3
    assert not any("network" in fmt for fmt in formats.values())


def test_few_rows_of_each_layer_are_kept(monkeypatch):
    kept = []
    share = Sample.share

    def watched(self, samples):
        kept.append(share(self, samples))
        return kept[-1]

    monkeypatch.setattr(Sample, "share", watched)
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data = torch.randn(96, 64)
    settle(NETWORK, model=model)
    assert all(sample.weight.numel() <= 65536 / 14 for sample in kept)
    assert all(sample.weight.untyped_storage().nbytes() == 4 * sample.weight.numel() for sample in kept)


def test_a_budget_is_kept_and_used(original, run):
    plain = run(original("llama"), {key: value for key, value in BUDGET.items() if "compensation" not in key}, "plain")
    result = run(original("llama"), BUDGET)
    rank = 8 * (64 + 96) + 32
    weights = sum(report.shape[0] * report.shape[1] for report in result.reports)
    assert 0.7 - rank / weights < result.bits - plain.bits <= 0.7
    _, settled = settle(BUDGET)
    ranks = {layer.compensation.rank for layer in settled.values()}
    assert len(ranks) > 1
    assert max(ranks) <= 16


def test_layers_with_other_options_share_another_budget():
    layers = {"*.mlp.*": {"compensation_options": {"budget": 0.2}}, "*.q_proj": {"compensation": "bias"}}
    _, settled = settle({**BUDGET, "layers": layers})
    for names, budget in ((".mlp.", 0.2), (".self_attn.", 0.7)):
        part = [layer for name, layer in settled.items() if names in name and layer.scheme.compensation == "lorc"]
        weights = sum(layer.shape[0] * layer.shape[1] for layer in part)
        bits = sum(layer.compensation.rank * (8 * sum(layer.shape) + 32) for layer in part)
        assert budget * weights - 8 * 160 - 32 < bits <= budget * weights


@pytest.mark.parametrize("changes", [BUDGET, NETWORK, {**BUDGET, **NETWORK}], ids=["budget", "network", "both"])
def test_a_killed_run_ends_with_the_same_bytes(changes, original, run, tokens, tmp_path):
    whole = run(original("llama"), changes, "whole")
    killed(original("llama"), tmp_path / "out", at("layer", 12), tokens, changes)
    result = run(original("llama"), changes)
    assert result.resumed_blocks == 1
    assert files(result.folder) == files(whole.folder)
    assert quantlab.load(result.folder) is not None


@pytest.mark.parametrize("changes", [BUDGET, NETWORK], ids=["budget", "network"])
def test_a_weight_that_is_not_finite_is_refused_by_name(changes, run, tmp_path):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj: its weight holds NaN"):
        run(model, changes)
    assert not list(tmp_path.iterdir())


def test_one_block_is_in_memory_at_a_time(monkeypatch):
    source = ModuleSource(tiny_model("llama"))
    model = source.skeleton()
    architecture = describe(model)
    plan = preflight.plan(load_recipe({"granularity": 16, **BUDGET}), architecture, model)
    for layer, _ in ahead._weights(plan, source, model, architecture):
        real = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
        assert real <= {name for name, _ in model.named_parameters() if name.startswith(layer.block + ".")}
