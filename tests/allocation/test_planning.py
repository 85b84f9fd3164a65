"""Plans as users meet them: budgets, recipes that run, what agrees, the cache, explanations, the command."""

from __future__ import annotations

import json
import math
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import quantlab
from quantlab.allocation import error, task
from quantlab.allocation.budget import Budget, parse_budget
from quantlab.allocation.choices import InfeasibleError
from quantlab.allocation.explanation import explain
from quantlab.allocation.plan import read_plan
from quantlab.cli.app import main
from quantlab.errors import PreflightError, QuantlabError, RecipeError


@pytest.mark.parametrize(
    ("text", "kind", "limit"),
    [
        (3.5, "bits", 3.5),
        ("3.5 bits", "bits", 3.5),
        ("4code-bits", "code-bits", 4),
        ("90MB", "bytes", 90e6),
        ("2GiB", "bytes", 2 * 2**30),
        ("20ms", "seconds", 0.02),
        ("loss=1e-2", "loss", 0.01),
        ("ppl=2%", "loss", math.log(1.02)),
    ],
)
def test_budgets_are_read(text, kind, limit):
    found = parse_budget(text)
    assert (found.kind, found.limit) == (kind, pytest.approx(limit))
    again = parse_budget(str(found))
    assert (again.kind, again.limit) == (kind, pytest.approx(limit, rel=1e-3))


@pytest.mark.parametrize("text", ["", "many", "0", "-3", "3 parsecs", "ppl=2", "loss=5%", "nan", "1e400", "like="])
def test_budgets_that_cannot_be_are_refused(text):
    with pytest.raises(RecipeError, match="like=RECIPE"):
        parse_budget(text)


@pytest.mark.parametrize("budget", [3.2, "3.4code-bits", "140kB"])
def test_a_plan_is_a_recipe_of_exactly_its_bytes(plan, model, tokens, tmp_path, budget):
    found = plan(budget)
    limit = parse_budget(budget)
    spent = {"bits": found.bits, "code-bits": found.code_bits, "bytes": found.bytes + found.fixed_bytes}[limit.kind]
    assert 0.9 * limit.limit < spent <= limit.limit
    found.write(tmp_path / "plan.yaml")
    result = quantlab.quantize(model, tmp_path / "plan.yaml", tmp_path / "out", calibration=tokens)
    assert sum(report.bytes for report in result.reports) == found.bytes
    formats = {report.layer: report.format for report in result.reports}
    for item in found.items:
        assert {formats[name] for name in item.layers} == {item.got.candidate.partition("/")[0]}
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["plan"]["budget"] == str(limit)


def test_larger_budgets_never_hurt_and_the_reverse_agrees(plan):
    plans = [plan(bits) for bits in (3.1, 3.6, 4.2, 5.5)]
    losses = [found.loss for found in plans]
    assert losses == sorted(losses, reverse=True)
    back = plan(f"loss={plans[1].loss * (1 + 1e-9)!r}")
    assert back.bytes <= plans[1].bytes
    assert back.loss <= plans[1].loss * (1 + 1e-6)


def test_the_error_of_a_uniform_recipe_as_the_budget(plan, tmp_path):
    (tmp_path / "uniform.yaml").write_text("format: int4\n")
    found = plan(f"like={tmp_path / 'uniform.yaml'}")
    uniform = [next(o for o in item.options if o.candidate.startswith("int4")) for item in found.items]
    assert found.loss <= sum(option.loss for option in uniform) * (1 + 1e-9)
    assert found.bytes <= sum(option.bytes for option in uniform)


def test_layers_of_one_kernel_agree_unless_they_need_not(plan):
    together, apart = plan(3.3), plan(3.3, together=False)
    assert [len(item.layers) for item in together.items] == [3, 1, 2, 1] * 4
    assert {len(item.layers) for item in apart.items} == {1}
    assert apart.loss <= together.loss, "fewer conditions"
    assert len({apart.item_of(f"model.layers.{i}.self_attn.{x}_proj").got for i in range(4) for x in "qkv"}) > 1


def test_sensitivities_are_measured_once_for_all_budgets(plan, model, tokens, tmp_path, monkeypatch):
    runs, plan = [], partial(plan, cache=tmp_path)
    monkeypatch.setattr(error, "survey", lambda *a, real=error.survey, **k: (runs.append(1), real(*a, **k))[1])
    assert not plan(3.3).cached
    assert plan(4.0).cached
    assert plan("loss=0.5", together=False).cached
    assert len(runs) == 1
    assert not plan(4.0, candidates="formats=int3,int4").cached
    assert not plan(4.0, calibration=tokens.flip(0)).cached
    other = LlamaForCausalLM(model.config).eval()
    assert not plan(4.0, model=other).cached
    assert len(runs) == 4


def test_an_infeasible_budget_says_what_is_feasible(plan, tmp_path, monkeypatch):
    plan = partial(plan, cache=tmp_path)
    monkeypatch.setattr(error, "survey", None)  # and says it before anything is measured
    for budget in (1.0, "1code-bits", "100kB"):
        with pytest.raises(InfeasibleError, match="at least") as caught:
            plan(budget, candidates="formats=int3,int4")
        monkeypatch.undo()
        kind = parse_budget(budget).kind
        assert plan(Budget(kind, caught.value.least), candidates="formats=int3,int4").code_bits == 3
    with pytest.raises(InfeasibleError, match="--keep"):
        plan("loss=1e-9", candidates="formats=int3,int4")
    assert plan("loss=1e-9", candidates="formats=int3,int4", keep=True).loss <= 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sensitivity": "guess"}, "use one of error"),
        ({"solver": "guess"}, "use one of auto"),
        ({"options": {"coefficients": "guess"}}, "gradient"),
        ({"include": ["*.nothing"]}, "lm_head"),
        ({"candidates": "formats=int4 groups=48"}, "not divisible"),
        ({"recipe": {"transforms": "hadamard"}}, "transforms=none"),
        ({"budget": "loss=0.1", "options": {"coefficients": "none"}}, "predicts no loss"),
    ],
)
def test_what_cannot_be_is_refused(plan, arguments, message):
    with pytest.raises(QuantlabError, match=message):
        plan(arguments.pop("budget", 3.5), **arguments)


@pytest.mark.parametrize("method", ["error", "kl", "hessian", "delta-loss", "pairwise"])
def test_a_model_that_memory_cannot_hold_is_refused_before_any_work(plan, tmp_path, monkeypatch, method):
    monkeypatch.setattr(task.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(error, "Survey", None)
    with pytest.raises(PreflightError, match="coefficients none"):
        plan(3.5, sensitivity=method, cache=tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(error, "coefficients", None)
    assert not plan(3.5, options={"coefficients": "none"}, cache=tmp_path).predicts


def test_a_head_and_embeddings_take_part_if_asked(model, tokens, tmp_path):
    config = LlamaConfig(**{**model.config.to_dict(), "tie_word_embeddings": True, "num_hidden_layers": 2})
    torch.manual_seed(0)
    tied = LlamaForCausalLM(config).eval()
    kwargs = {"recipe": {"granularity": 32, "quantizer": "gptq"}, "calibration": tokens, "cache": tmp_path}
    without = quantlab.plan(tied, 4.0, **kwargs)
    found = quantlab.plan(tied, 4.0, include=["lm_head", "model.embed_tokens"], **kwargs)
    head = found.item_of("lm_head")
    assert head.layers == ("lm_head", "model.embed_tokens"), "they share a weight"
    by_bits = {option.bits: option.loss for option in head.options}
    assert all(by_bits[more] < by_bits[less] for less, more in pairwise([2, 3, 4, 5, 6, 8]))
    assert found.fixed_bytes < without.fixed_bytes
    result = quantlab.quantize(tied, found.recipe(), tmp_path / "out", calibration=tokens)
    assert sum(report.bytes for report in result.reports) == found.bytes


def test_experts_of_a_block_are_one_item_and_one_line(tokens, tmp_path):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    moe = Qwen3MoeForCausalLM(config).eval()
    kwargs = {"recipe": {"granularity": 32, "quantizer": "gptq"}, "calibration": tokens, "cache": tmp_path}
    found = quantlab.plan(moe, 3.6, candidates="formats=int3,int4,int6", **kwargs)
    expert = found.item_of("model.layers.1.mlp.experts.2.down_proj")
    assert expert.layers == tuple(f"model.layers.1.mlp.experts.{e}.down_proj" for e in range(4))
    assert "model.layers.1.mlp.experts.*.down_proj" in found.recipe().layers
    result = quantlab.quantize(moe, found.recipe(), tmp_path / "out", calibration=tokens)
    assert sum(report.bytes for report in result.reports) == found.bytes
    kl = quantlab.plan(moe, 3.6, candidates="formats=int3,int4", sensitivity="kl", **kwargs)
    assert kl.item_of("model.layers.1.mlp.experts.2.down_proj").layers == expert.layers


def test_a_plan_is_explained_from_its_file(plan, tmp_path):
    found = plan(3.3)
    found.write(tmp_path / "plan.yaml")
    again = read_plan(tmp_path / "plan.yaml")
    assert again.loss == pytest.approx(found.loss)
    assert again.price == pytest.approx(found.price)
    item, said = explain(again, "model.layers.1.self_attn.k_proj")
    assert "model.layers.1.self_attn.q_proj" in item.layers
    assert "shares its scheme with" in said[0]
    assert any("elsewhere" in sentence or "would be the next" in sentence for sentence in said)
    with pytest.raises(RecipeError, match="k_proj"):
        explain(again, "k_proj")
    (tmp_path / "plain.yaml").write_text("format: int4\n")
    with pytest.raises(RecipeError, match="no allocator wrote"):
        read_plan(tmp_path / "plain.yaml")


def test_a_changed_line_is_what_is_carried_out(plan, model, tokens, tmp_path):
    plan(3.3).write(tmp_path / "plan.yaml")
    data = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    data["layers"]["model.layers.0.mlp.down_proj"] = {"format": "int8"}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    result = quantlab.quantize(model, tmp_path / "plan.yaml", tmp_path / "out", calibration=tokens)
    assert {report.layer: report.format for report in result.reports}["model.layers.0.mlp.down_proj"] == "int8"


# --- the command ---


@pytest.fixture
def folder(model, save_tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model", 96)
    text = " ".join(f"w{1 + (i * i + i // 7) % 95}" for i in range(900))
    (tmp_path / "text.txt").write_text(text)
    return tmp_path / "model"


def command(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


def test_the_command_plans_quantizes_and_explains(folder, tmp_path, capsys):
    file, text = tmp_path / "plan.yaml", tmp_path / "text.txt"
    plan = ["plan", folder, "--budget", "3.5bits", "--out", file, "--set", "granularity=32", "--calibration", text]
    plan += ["--samples", 8, "--length", 32, "--cache", tmp_path / "cache"]
    code, out, err = command(capsys, *plan)
    assert code == 0, err
    assert "predicted" in out
    assert "█" in out
    assert "model.layers.2" in err, "progress"
    code, out, _ = command(capsys, *plan, "--json")
    document = json.loads(out)
    assert document["cached"]
    assert document["bits"] <= 3.5
    assert set(document["bits_by_layer"].values()) <= {2, 3, 4, 5, 6, 8}
    code, out, err = command(capsys, "quantize", folder, "--recipe", file, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    assert json.loads(out)["bits"] == pytest.approx(document["bits"])
    code, out, _ = command(capsys, "inspect", file, "--layer", "model.layers.3.mlp.down_proj")
    assert code == 0
    assert "predicted to lose" in out
    assert command(capsys, "inspect", tmp_path / "out", "--layer", "model.layers.3.mlp.down_proj")[1] == out
    code, out, _ = command(capsys, "inspect", file, "--json")
    assert json.loads(out)["budget"] == "3.5bits"
    assert len(json.loads(out)["items"]) == 16


def test_the_command_draws_the_curve_and_checks_it(folder, tmp_path, capsys):
    common = ["plan", folder, "--calibration", tmp_path / "text.txt", "--samples", 8, "--length", 32]
    common += [
        "--set",
        "granularity=32",
        "--cache",
        tmp_path / "cache",
        "--text",
        tmp_path / "text.txt",
        "--windows",
        4,
    ]
    code, out, err = command(capsys, *common, "--pareto", "--points", 9, "--measure", 2, "--out", tmp_path / "c.json")
    assert code == 0, err
    assert "times the predicted loss" in out
    found = json.loads((tmp_path / "c.json").read_text())
    assert [plan["bytes"] for plan in found["plans"]] == sorted(plan["bytes"] for plan in found["plans"])
    losses = [plan["loss"] for plan in found["plans"]]
    assert losses == sorted(losses, reverse=True)
    measured = [plan for plan in found["plans"] if plan["measured"] is not None]
    assert len(measured) == 2
    assert measured[0]["measured"] > measured[1]["measured"]
    assert 0.3 < found["ratio"] < 3
    file = tmp_path / "plan.yaml"
    code, out, err = command(capsys, *common, "--budget", "3.3", "--measure", 1, "--out", file, "--json")
    assert json.loads(out)["measured"] > 0
    assert read_plan(file).measured == json.loads(out)["measured"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "3", "--pareto"], "--pareto for all"),
        (["--pareto"], ".json"),
        (["--budget", "1bits"], "at least"),
        (["--budget", "3", "--out", "plan.txt"], ".yaml"),
        (["--budget", "3", "--option", "rows"], "KEY=VALUE"),
    ],
)
def test_the_command_refuses(folder, tmp_path, capsys, arguments, message):
    common = ["--set", "granularity=32", "--calibration", tmp_path / "text.txt", "--samples", 4, "--length", 32]
    code, _, err = command(capsys, "plan", folder, "--out", tmp_path / "p.yaml", *common, *arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "p.yaml").exists()
