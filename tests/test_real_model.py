"""The real command on a real model: SmolLM2-135M-Instruct, as a user would run it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantlab.checkpoint.demo import demo_model
from quantlab.nn import QuantLinear

pytestmark = pytest.mark.slow


def quantlab(*arguments: str) -> dict:
    command = [sys.executable, "-m", "quantlab.cli", *arguments, "--json", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "w4"
    settings = ("--samples", "8", "--length", "256")
    return out, quantlab("quantize", "demo", "--recipe", "w4-gptq", "--out", str(out), *settings)


def test_the_main_job(quantized):
    out, result = quantized
    assert len(result["layers"]) == 210
    assert all(layer["tokens"] == 8 * 256 for layer in result["layers"])
    assert all(0 < layer["error"] < 0.05 for layer in result["layers"])
    assert result["bits"] == pytest.approx(4.25, abs=0.01)
    assert result["bytes"] < 0.43 * result["original_bytes"]
    found = quantlab("eval", str(out), "--against", "demo", "--windows", "2", "--length", "512")
    assert found["divergence"]["agreement"] > 0.75
    assert found["divergence"]["kl"] < 0.25
    assert 1 < found["divergence"]["difference"]["perplexity_ratio"] < 1.25


@pytest.mark.usefixtures("reference_kernel")
def test_the_checkpoint_is_the_model_with_decoded_weights(quantized):
    out, _ = quantized
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    plain = AutoModelForCausalLM.from_pretrained(demo_model(), dtype="auto")
    for name, module in loaded.named_modules():
        if isinstance(module, QuantLinear):
            plain.get_submodule(name).weight.data = module.to_qtensor().dequantize(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(out)
    question = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**question).logits, plain.eval()(**question).logits)
    answer = loaded.generate(**question, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
