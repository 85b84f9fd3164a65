"""Verification on a device. There is none here: the process of its own runs, where it is told to, on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import quantlab
from quantlab.checkpoint.quantized import DIGEST, QuantizedFolder
from quantlab.errors import PreflightError
from quantlab.verification import device as device_module
from quantlab.verification import loader, verify
from quantlab.verification.device import check_on
from quantlab.verification.digest import Digest
from quantlab.verification.streamed import decoded_logits

CPU = torch.device("cpu")
PROMPTS = torch.arange(48).view(2, 24).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("verified") / "w4"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=200, initializer_range=0.2, **sizes)).to(torch.bfloat16)
    quantlab.quantize(model, {"quantizer": "rtn", "scale_search": "absmax", "granularity": 32}, out)
    return out


@pytest.fixture(scope="module")
def digest(folder):
    logits = decoded_logits(QuantizedFolder(folder), [*PROMPTS, PROMPTS[0]], shaken=True)
    return Digest.of(PROMPTS, logits[:-1], logits[-1])


def test_a_process_of_its_own_is_held_against_the_codes(folder, digest):
    found = check_on(CPU, folder, digest)
    assert found.passed is True, found.detail
    assert found.name == "on cpu its predictions are those of the codes"
    assert "computed in bfloat16" in found.detail
    other = replace(digest, logprobs=[[row[::-1] for row in rows] for rows in digest.logprobs])
    assert check_on(CPU, folder, other).passed is False


def test_it_is_loaded_on_the_device(folder, digest):
    """The meta device takes a model and has no numbers to say."""
    found = check_on(torch.device("meta"), folder, digest)
    assert found.passed is False
    assert "meta" in found.detail


def test_what_is_not_tried(folder, digest, monkeypatch, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    assert check_on(CPU, tmp_path / "model.gguf", digest).passed is None
    assert "no digest" in check_on(CPU, folder, None).detail
    monkeypatch.setattr(loader, "answer", lambda *_: {"error": "OutOfMemoryError: CUDA out of memory"})
    assert check_on(CPU, folder, digest).passed is None
    monkeypatch.setattr(device_module, "free_bytes", lambda _: 10)
    found = check_on(CPU, folder, digest)
    assert (found.passed, "not tried: it takes" in found.detail) == (None, True)


def test_one_that_is_not_there(folder):
    with pytest.raises(PreflightError, match="device 'cuda:99' cannot be used here"):
        verify(folder, device="cuda:99")
    assert not (folder / DIGEST).exists(), "nothing was done"


def test_the_check_comes_last(folder, monkeypatch):
    monkeypatch.setattr(device_module, "choose_device", lambda _: torch.device("meta"))
    on_cpu = loader.answer

    def answer(folder, dtype, digest, device="cpu"):
        return on_cpu(folder, dtype, digest) if device == "cpu" else {"missing": "a driver"}

    monkeypatch.setattr(loader, "answer", answer)
    done = verify(folder, device="cuda")
    assert done.passed
    assert done.checks[-1].detail == "not tried: a driver"
    assert json.loads((folder / DIGEST).read_text())["prompts"]
