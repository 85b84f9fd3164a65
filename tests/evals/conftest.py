"""A tiny tokenizer and tiny models, made here: no network, no files."""

from __future__ import annotations

import pytest
import torch
from quantlab_evals import Windows
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 64


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_tokenizer():
    """A tokenizer of the words w0 .. w59; `template` is what it puts around a text, like `<s> $A`."""

    def make(template="$A", **names):
        special = ["<unk>", "<s>", "</s>", "<pre>"]
        words = {word: i for i, word in enumerate(special + [f"w{i}" for i in range(VOCABULARY - 4)])}
        tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        tokenizer.post_processor = TemplateProcessing(
            single=template, special_tokens=[(word, words[word]) for word in special]
        )
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=8, **names)

    return make


@pytest.fixture(scope="session")
def make_model():
    """A random Llama; large weights, so that its predictions are far from uniform."""

    def make(seed=0, vocabulary=VOCABULARY):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            initializer_range=0.4,
        )
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def make_windows():
    def make(count=5, length=16, seed=0, vocabulary=VOCABULARY):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(vocabulary, (count, length), generator=generator)
        return Windows(tokens, None, 0, 0, tokens.numel(), 1, "\n\n")

    return make
