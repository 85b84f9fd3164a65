"""Other tools' perplexities against references that are written from what those tools do."""

from __future__ import annotations

import math
import random
import re

import pytest
import torch
from quantlab_evals import EvalError, perplexity, rolling_perplexity, windows_as
from torch.nn.functional import cross_entropy

TEMPLATES = ["$A", "<s> $A", "<s> $A </s>"]


@pytest.fixture(scope="module")
def documents():
    chosen = random.Random(0)
    return [" ".join(f"w{chosen.randrange(60)}" for _ in range(chosen.randrange(3, 40))) for _ in range(9)]


def nll(model, tokens, first):
    """The sum over tokens[first:], each predicted from all before it."""
    tokens = torch.tensor(tokens)
    with torch.no_grad():
        logits = model(tokens[None]).logits[0].double()
    return sum(cross_entropy(logits[i - 1], tokens[i]).item() for i in range(first, len(tokens)))


@pytest.mark.parametrize("template", TEMPLATES)
def test_gptq(make_model, make_tokenizer, documents, template):
    model, tokenizer = make_model(), make_tokenizer(template)
    stream = tokenizer("\n\n".join(documents))["input_ids"]
    samples = len(stream) // 16
    losses = [nll(model, stream[16 * i : 16 * i + 16], 1) / 15 * 16 for i in range(samples)]
    found = perplexity(model, windows_as("gptq", tokenizer, documents, 16))
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / (samples * 16)), rel=1e-5)
    assert "GPTQ" in found.settings["definition"]
    assert windows_as("gptq", tokenizer, documents * 300).length == 2048


@pytest.mark.parametrize("length", [8, 13])
@pytest.mark.parametrize("template", TEMPLATES)
def test_llama_cpp(make_model, make_tokenizer, documents, template, length):
    model, tokenizer = make_model(), make_tokenizer(template)
    text = "\n\n".join(documents)
    stream = tokenizer(text)["input_ids"]
    first, total, count = length // 2, 0.0, 0
    for start in range(0, len(stream) - length + 1, length):
        window = stream[start : start + length]
        if template != "$A":
            window[0] = 1
        total += nll(model, window, first + 1)
        count += length - 1 - first
    found = perplexity(model, windows_as("llama.cpp", tokenizer, [text + "\n"], length))
    assert found.tokens == count
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert windows_as("llama.cpp", tokenizer, documents * 50).length == 512


def test_one_that_does_not_exist_is_refused(make_tokenizer, documents):
    with pytest.raises(EvalError, match=r"'lama.cpp'.*quantlab, gptq, llama.cpp"):
        windows_as("lama.cpp", make_tokenizer(), documents)


@pytest.mark.parametrize("length", [1, 7, 32])
def test_rolling(make_model, make_tokenizer, documents, length):
    """Each token once, from at most `length` tokens before it."""
    model, tokenizer = make_model(), make_tokenizer("<s> $A", bos_token="<s>")
    total, tokens = 0.0, 0
    for document in documents:
        stream = tokenizer(document)["input_ids"]
        framed = [1, *stream]
        for block in range(0, len(stream), length):
            last = min(block + length, len(stream))
            for i in range(block + 1, last + 1):
                total += nll(model, framed[max(0, last - length) : i + 1], i - max(0, last - length))
        tokens += len(stream)
    found = rolling_perplexity(model, tokenizer, [*documents, ""], length=length)
    assert found.tokens == tokens
    assert found.token_perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)
    words = sum(len(document.split()) for document in documents)
    assert found.word_perplexity == pytest.approx(math.exp(total / words), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(math.log2(found.byte_perplexity))
    assert found.interval is None or found.interval[0] < found.word_perplexity < found.interval[1]


def test_rolling_counts_the_words_that_it_is_told_to(make_model, make_tokenizer):
    model, tokenizer = make_model(), make_tokenizer(eos_token="</s>")
    plain = rolling_perplexity(model, tokenizer, ["w1 w2 w3"])
    spaced = rolling_perplexity(model, tokenizer, ["w1 w2 w3"], counted=["w1 w2 w3 , ."])
    assert spaced.nll == plain.nll
    assert (plain.words, spaced.words) == (3, 5)
    with pytest.raises(EvalError, match="1 documents to count and 2 to read"):
        rolling_perplexity(model, tokenizer, ["w1", "w2"], counted=["w1"])
    with pytest.raises(EvalError, match="neither a BOS nor an EOS"):
        rolling_perplexity(model, make_tokenizer(), ["w1"])
    with pytest.raises(EvalError, match="all documents are empty"):
        rolling_perplexity(model, tokenizer, ["", ""])


def test_rolling_equals_lm_eval(make_model, make_tokenizer, documents):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance

    model, tokenizer = make_model(), make_tokenizer("<s> $A", bos_token="<s>", eos_token="</s>")
    theirs = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, max_length=12, batch_size=1)
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=i)
        for i, text in enumerate(documents)
    ]
    expected = -sum(theirs.loglikelihood_rolling(requests, disable_tqdm=True))
    found = rolling_perplexity(model, tokenizer, documents, length=12)
    assert found.nll == pytest.approx(expected, rel=1e-5)
    words = sum(len(re.split(r"\s+", text)) for text in documents)
    assert found.word_perplexity == pytest.approx(math.exp(expected / words), rel=1e-5)


def test_the_own_definition_equals_lm_eval_on_the_same_tokens(make_model, make_tokenizer, make_windows):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    model, windows = make_model(), make_windows(count=7, length=20)
    theirs = huggingface.HFLM(pretrained=model, tokenizer=make_tokenizer(eos_token="</s>"), max_length=32)
    requests = [(None, window[:1], window[1:]) for window in windows.tokens.tolist()]
    answers = theirs._loglikelihood_tokens(requests, disable_tqdm=True)
    found = perplexity(model, windows)
    assert found.nll == pytest.approx(-sum(answer[0] for answer in answers) / (7 * 19), rel=1e-5)
