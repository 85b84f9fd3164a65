"""Repairs end to end: quantized, killed, written, loaded again."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_resume import at, files, killed

import quantlab
from quantlab.engine.statistics import InputAccumulator
from quantlab.problem import Statistic

GPTQ_QERA = {"compensation": "qera-exact", "compensation_options": {"rank": 4}}
INT8_LORC = {"quantizer": "rtn", "compensation": "lorc", "compensation_options": {"rank": 8, "dtype": "int8"}}
ASYM = {"options": {"asym": 1.0}, "compensation": "qera-exact", "compensation_options": {"rank": 4, "iterations": 2}}
BIAS = {"compensation": "bias"}
STATISTICS = {"compensation": "statistics"}
CHANGES = {"qera": GPTQ_QERA, "lorc": INT8_LORC, "asym": ASYM, "bias": BIAS, "statistics": STATISTICS}


def logits(folder, tokens):
    with torch.no_grad():
        return quantlab.load(folder)(input_ids=tokens[:2]).logits


def test_a_new_process_computes_the_same(original, run, tokens, tmp_path):
    folders = [run(original("llama-bf16"), changes, name).folder for name, changes in CHANGES.items()]
    torch.save(tokens, tmp_path / "tokens.pt")
    code = (
        "import sys, torch, quantlab; torch.set_num_threads(1)\n"
        "from transformers import AutoModelForCausalLM\n"
        "tokens = torch.load(sys.argv[1])[:2]\n"
        "models = [AutoModelForCausalLM.from_pretrained(folder, dtype='auto').eval() for folder in sys.argv[3:]]\n"
        "torch.save([model(input_ids=tokens).logits for model in models], sys.argv[2])"
    )
    command = [sys.executable, "-c", code, tmp_path / "tokens.pt", tmp_path / "logits.pt", *folders]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    for folder, found in zip(folders, torch.load(tmp_path / "logits.pt"), strict=True):
        assert torch.equal(found, logits(folder, tokens)), folder.name


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "opt", "albert"])
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_it_works_with_every_kind_of_model(changes, name, original, run):
    result = run(original(name), changes)
    assert {report.compensation for report in result.reports} == {changes["compensation"]}
    inspection = quantlab.inspect(result.folder)
    assert inspection.bits == pytest.approx(result.bits)
    model = quantlab.load(result.folder)
    if changes["compensation"] in ("bias", "statistics"):
        assert all(model.get_submodule(report.layer).bias is not None for report in result.reports if report.tokens)


@pytest.mark.parametrize("changes", [GPTQ_QERA, INT8_LORC], ids=["qera", "lorc"])
def test_the_bits_are_those_on_disk(changes, original, run):
    result = run(original("llama"), changes)
    tensors = {}
    for file in result.folder.glob("*.safetensors"):
        tensors |= load_file(file)
    quantized = tuple(f"{report.layer}." for report in result.reports)
    stored = [tensor for name, tensor in tensors.items() if name.startswith(quantized)]
    weights = sum(report.shape[0] * report.shape[1] for report in result.reports)
    assert result.bits == 8 * sum(tensor.nbytes for tensor in stored) / weights


@pytest.mark.parametrize("changes", [GPTQ_QERA, INT8_LORC, BIAS], ids=["qera", "lorc", "bias"])
def test_the_repaired_model_is_closer_to_the_original(changes, original, run, tokens):
    plain = {key: value for key, value in changes.items() if not key.startswith("compensation")}
    wanted = logits(original("llama"), tokens)
    far, near = (
        float((logits(run(original("llama"), {**how, "format": "int2"}, out).folder, tokens) - wanted).square().mean())
        for how, out in ((plain, "plain"), (changes, "repaired"))
    )
    assert near < far


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["llama", "albert"])
def test_a_killed_run_ends_with_the_same_bytes(changes, name, original, run, tokens, tmp_path):
    """Biases that a repair added come back with the block; the blocks of an Albert are run several times."""
    whole = run(original(name), changes, "whole")
    last = len(whole.reports)
    killed(original(name), tmp_path / "out", at("layer", last), tokens, changes)
    result = run(original(name), changes)
    assert result.resumed_blocks == (0 if name == "albert" else 1)
    assert files(result.folder) == files(whole.folder)


def test_an_added_bias_is_what_the_next_layers_saw(original, run, tokens):
    """Statistics of a resumed run are those of the first only if the bias is part of the restored block."""
    result = run(original("llama"), BIAS)
    model, plain = quantlab.load(result.folder), quantlab.load(original("llama"))
    assert plain.model.layers[0].mlp.down_proj.bias is None
    means = {}

    def keep(name, quantized):
        def hook(module, args, output):
            means[name, quantized] = output.reshape(-1, output.shape[-1]).mean(0)

        return hook

    for found, quantized in ((model, True), (plain, False)):
        for name in ("q_proj", "k_proj", "v_proj"):
            found.model.layers[0].self_attn.get_submodule(name).register_forward_hook(keep(name, quantized))
        with torch.no_grad():
            found(input_ids=tokens)
    for name in ("q_proj", "k_proj", "v_proj"):  # whose inputs are the original's own
        torch.testing.assert_close(means[name, True], means[name, False], rtol=1e-3, atol=1e-5)


def test_layers_of_one_input_may_have_different_repairs(original, run):
    changes = {
        "compensation": "bias",
        "layers": {
            "*.q_proj": {"compensation": "qera-exact"},
            "*.v_proj": {"compensation": "none"},
            "*.up_proj": {"quantizer": "rtn", "compensation": "l2qer", "compensation_options": {"rank": 2}},
        },
    }
    result = run(original("llama"), changes)
    found = {report.layer.rpartition(".")[2]: report.compensation for report in result.reports}
    assert found["q_proj"] == "qera-exact"
    assert found["v_proj"] == "none"
    assert found["up_proj"] == "l2qer"
    assert found["down_proj"] == "bias"
    quantlab.load(result.folder)


def test_means_and_magnitudes_of_the_inputs():
    x = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0)) + torch.linspace(-2, 2, 16)
    x[1, :, 5] *= 9
    accumulator = InputAccumulator(Statistic.MEAN | Statistic.MAGNITUDE, 16)
    accumulator.add(x[:2])
    accumulator.add(x[2:])
    statistics = accumulator.finish()
    torch.testing.assert_close(statistics.mean, x.mean((0, 1)))
    torch.testing.assert_close(statistics.magnitude, x.abs().mean(1).amax(0))
    assert (statistics.tokens, statistics.diagonal, statistics.second_moment) == (120, None, None)
