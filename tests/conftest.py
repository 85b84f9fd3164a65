"""What tests of several parts share: one thread, and a tokenizer that is made here. No network."""

from __future__ import annotations

from pathlib import Path

import pytest
import quantlab_kernels
import torch
import transformers
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


@pytest.fixture(scope="session")
def save_tokenizer():
    """Put a tokenizer of the words w0 .. w<n> into a model's folder."""

    def save(folder: Path, vocabulary: int) -> None:
        words = {"<unk>": 0, **{f"w{i}": i for i in range(1, vocabulary)}}
        tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)

    return save
