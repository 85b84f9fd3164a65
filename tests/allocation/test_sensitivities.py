"""What sensitivities say, against plain computations on a tiny model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from quantlab.allocation import curvature, error
from quantlab.allocation.budget import parse_budget
from quantlab.allocation.curvature import backward, coefficients, injected
from quantlab.allocation.delta_loss import rounded, weighted_gradients
from quantlab.allocation.hessian import traces
from quantlab.allocation.resumed import ResumedDivergence
from quantlab.engine.architecture import describe
from quantlab.planning import prepare_planning

LAYERS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.o_proj",
    "model.layers.2.mlp.up_proj",
    "model.layers.3.mlp.down_proj",
]


def kl(model, tokens, changes):
    """By the definition, from the start."""
    changed = copy.deepcopy(model)
    for name, weight in changes.items():
        changed.get_submodule(name).weight.copy_(weight)
    p, q = (m(input_ids=tokens).logits[:, :-1].double().log_softmax(-1) for m in (model, changed))
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def noise(model, name, size, seed=0):
    weight = model.get_submodule(name).weight
    return weight + size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("names", [[name] for name in LAYERS] + [LAYERS[1:3], ["lm_head"], ["model.embed_tokens"]])
def test_a_resumed_forward_is_the_whole_one(model, tokens, names):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resumed = ResumedDivergence(model, describe(model), tokens[:4])
    assert resumed.resumes
    changes = {name: noise(model, name, 0.02) for name in names}
    assert resumed.of(changes) == pytest.approx(kl(model, tokens[:4], changes), rel=1e-3)
    assert resumed.of({}) == pytest.approx(0, abs=1e-7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_blocks_before_the_change_are_not_run(model, tokens):
    resumed = ResumedDivergence(model, describe(model), tokens[:2])
    ran = []
    handles = [
        model.get_submodule(f"model.layers.{i}.mlp.up_proj").register_forward_hook(lambda *_, i=i: ran.append(i))
        for i in range(4)
    ]
    resumed.of({LAYERS[2]: noise(model, LAYERS[2], 0.1)})
    for handle in handles:
        handle.remove()
    assert ran == [2, 3]


def test_coefficients_are_what_noise_measures(model, tokens):
    """KL of small noise in a layer's output, over the noise's squared size: HIGGS' injection, averaged over draws."""
    found = coefficients(model, LAYERS, tokens.repeat(8, 1), seed=0)
    text = tokens
    for name in LAYERS:
        layer, measured = model.get_submodule(name), []
        reference = model(input_ids=text).logits.double().log_softmax(-1)
        for seed in range(6):
            generator = torch.Generator().manual_seed(seed)

            def add(_module, _args, output, generator=generator):
                return output + 0.01 * torch.randn(output.shape, generator=generator)

            handle = layer.register_forward_hook(add)
            with torch.no_grad():
                logits = model(input_ids=text).logits.double().log_softmax(-1)
            handle.remove()
            measured.append(float((reference.exp() * (reference - logits)).sum(-1)[:, :-1].mean()))
        squares = 0.01**2 * layer.weight.shape[0]
        assert found[name] == pytest.approx(np.mean(measured) / squares, rel=0.2), name


def test_layers_that_share_an_input_share_its_leverage(model, tokens, monkeypatch):
    calls = []
    leverage = curvature._leverage
    monkeypatch.setattr(curvature, "_leverage", lambda inputs: calls.append(inputs) or leverage(inputs))
    coefficients(model, list(describe(model).layers["model.layers.1"]), tokens)
    assert len(calls) == 4  # q/k/v, o, gate/up, down


def test_injected_noise_gives_the_same_coefficients(model, tokens):
    """Two ways to the same numbers that share no formula.

    In the last block they agree. Before it noise says more: what it does to tokens that are alike is alike, and does
    not average out where a random model's attention averages over all of them.
    """
    names = [f"model.layers.{i}.{x}" for i in (0, 3) for x in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")]
    by_noise = injected(ResumedDivergence(model, describe(model), tokens), names)
    by_gradient = coefficients(model, names, tokens.repeat(4, 1))
    ratios = np.array([by_noise[name] / by_gradient[name] for name in names])
    assert ratios[3:] == pytest.approx(1, rel=0.12)
    assert (ratios[:3] > 0.9).all()
    assert (ratios[:3] < 2).all()


def test_gradients_are_those_of_autograd(model, tokens):
    taken = {}
    loss = backward(model, LAYERS, tokens[:2], None, lambda name, gradient: taken.update({name: gradient}))
    twin = copy.deepcopy(model).requires_grad_(True)
    logits = twin(input_ids=tokens[:2]).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tokens[:2, 1:].flatten(), reduction="sum")
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    seen = {}
    layer = twin.get_submodule(LAYERS[2])
    layer.register_forward_hook(lambda _m, args, _o: seen.update(x=args[0].detach()))
    logits = twin(input_ids=tokens[:2]).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, tokens[:2, 1:].flatten(), reduction="sum").backward()
    of_weight = taken[LAYERS[2]].flatten(0, 1).T @ seen["x"].flatten(0, 1)
    torch.testing.assert_close(of_weight, layer.weight.grad, rtol=1e-3, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def planning(model, tokens, tmp_path, **kwargs):
    settings = {"recipe": {"granularity": 32, "quantizer": "gptq"}, "calibration": tokens, "cache": tmp_path}
    return prepare_planning(model, **{**settings, **kwargs})


def test_some_rows_stand_for_all(model, tokens, tmp_path):
    """The estimated error of a layer is that of all its rows, within what a few rows can say."""
    some, every = (
        planning(model, tokens, tmp_path, candidates="formats=int2,int4", options={"rows": rows}).measured()[0]
        for rows in (24, 1000)
    )
    ratios = np.array([unit.errors for unit in some.units]) / np.array([unit.errors for unit in every.units])
    assert np.abs(np.log(ratios)).mean() < 0.12
    assert ratios.min() > 0.6
    assert ratios.max() < 1.6
    assert (ratios == 1).sum() < ratios.size / 2, "rows were left out"


def test_predicted_losses_are_of_the_size_of_measured_ones(model, tokens, tmp_path):
    """Two sensitivities that share no formula agree on which items matter, and on how much."""
    plain = {"candidates": "formats=int3,int4"}
    error = planning(model, tokens, tmp_path, **plain).measured()[0]
    measured = planning(model, tokens, tmp_path, sensitivity="kl", **plain).measured()[0]
    items = [unit.layers for unit in measured.units]
    predicted, found = error.of_items(items), measured.of_items(items)
    assert found.shape == (4 * 4, 2)
    assert np.corrcoef(np.log(predicted[:, 0]), np.log(found[:, 0]))[0, 1] > 0.8
    assert 0.5 < predicted.sum() / found.sum() < 2


def test_errors_without_coefficients_take_no_gradient(model, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("quantlab.allocation.error.coefficients", None)
    plain = planning(model, tokens, tmp_path, options={"coefficients": "none"}).measured()[0]
    assert not plain.predicts
    assert all(unit.losses == unit.errors for unit in plain.units)


def test_traces_of_a_quadratic_are_those_of_its_blocks():
    """``1/2 w^T A w``: the trace of each block of A, whatever lies between blocks."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    matrix = root @ root.T
    weights = [torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_() for n in (5, 7)]

    def loss():
        w = torch.cat(weights)
        return (w @ matrix @ w + 0 * w.pow(3).sum()) / 2

    found = traces(loss, weights, 4000)
    assert found[0] == pytest.approx(float(matrix[:5, :5].trace()), rel=0.05)
    assert found[1] == pytest.approx(float(matrix[5:, 5:].trace()), rel=0.05)
    diagonal = matrix.diagonal().diag()
    matrix = diagonal  # without anything off the diagonal one draw is exact
    assert traces(loss, weights, 1) == pytest.approx([float(diagonal[:5, :5].sum()), float(diagonal[5:, 5:].sum())])


def test_delta_loss_is_the_gradient_times_the_change(model, tokens, tmp_path):
    task = planning(model, tokens[:, :32], tmp_path, candidates="formats=int2,int4").task
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with rounded(model, task, 0) as originals:
        found = weighted_gradients(model, originals, tokens[:3])
        twin = copy.deepcopy(model).requires_grad_(True)
        logits = twin(input_ids=tokens[:3]).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, tokens[:3, 1:].flatten()).backward()
        for name in LAYERS:
            quantized, gradient = twin.get_submodule(name).weight, twin.get_submodule(name).weight.grad
            change = before[f"{name}.weight"] - quantized.detach()
            assert found[name] == pytest.approx(float((gradient * change).abs().sum()), rel=1e-3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("method", ["hessian", "delta-loss"])
def test_other_sensitivities_fall_with_the_bits_and_make_plans(model, tokens, tmp_path, method):
    found = planning(model, tokens, tmp_path, sensitivity=method, candidates="formats=int2,int4,int8")
    sensitivity = found.measured()[0]
    losses = np.array([unit.losses for unit in sensitivity.units])
    assert (losses >= 0).all()
    assert (losses[:, 0] >= losses[:, 1]).mean() > 0.9
    assert (losses[:, 1] >= losses[:, 2]).mean() > 0.9
    assert ("model.layers.2.mlp.gate_proj", "model.layers.2.mlp.up_proj") in sensitivity.groups
    plan = found.solve(parse_budget(4.0))
    assert not plan.predicts
    assert plan.bits <= 4


def test_layers_that_the_text_does_not_reach_are_no_bargain(model, tokens, tmp_path, monkeypatch):
    """A coefficient of zero says that nothing is known, not that nothing is lost."""
    silent = "model.layers.1.mlp.down_proj"
    real = error.coefficients
    monkeypatch.setattr(error, "coefficients", lambda *a, **k: real(*a, **k) | {silent: 0.0})
    found = planning(model, tokens, tmp_path, candidates="formats=int2,int4").measured()[0]
    losses = {unit.layers[0]: unit.losses for unit in found.units}
    assert losses[silent][0] > losses[silent][1] > 0
    assert any("not reached" in note and silent in note for note in found.notes)
