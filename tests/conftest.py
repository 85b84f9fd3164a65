"""What tests of several parts share: one thread, and a tokenizer that is made here. No network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import quantlab_kernels
import torch
import transformers
from quantlab_kernels import quantizing
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast


@pytest.fixture(autouse=True, scope="session")
def _quiet_and_single_threaded():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture
def reference_kernel():
    """Quantized layers compute with the decoded weight exactly: for tests that compare to the bit."""
    with quantlab_kernels.force("reference"):
        yield


@pytest.fixture
def in_process(monkeypatch):
    """The program by which verification loads a folder in a process of its own, run in this one."""
    from quantlab.checkpoint.native import QUANT_METHOD
    from quantlab.verification import fresh, loader

    def answer(folder, dtype, digest):
        ours = loader.quant_method(folder) == QUANT_METHOD
        try:
            return json.loads(json.dumps(fresh._answer(str(folder), dtype, ours, digest.to_dict())))
        except ImportError as error:
            return {"missing": str(error)}
        except Exception as error:
            return {"error": str(error)}

    monkeypatch.setattr(loader, "answer", answer)


@pytest.fixture
def in_torch(monkeypatch):
    """Weights are made by torch's own operations, as on other devices: for tests that compare one to the bit."""
    monkeypatch.setattr(quantizing, "_has_kernel", lambda *_: False)


@pytest.fixture(scope="session")
def save_tokenizer():
    """Put a tokenizer of the words w0 .. w<n> into a model's folder."""

    def save(folder: Path, vocabulary: int) -> None:
        words = {"<unk>": 0, **{f"w{i}": i for i in range(1, vocabulary)}}
        tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)

    return save
