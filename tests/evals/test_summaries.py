from __future__ import annotations

import json
import sys

import pytest
import torch
from quantlab_evals import EvalError, Sampling, SummaryPair, load_pairs, summarize_documents
from transformers import T5Config, T5ForConditionalGeneration

PAIRS = [SummaryPair("w1 w2 w3 w4 w5", "w1 w2"), SummaryPair("w9 w8 w7", "w7 w7 w6"), SummaryPair("w3", "w3")]
SHORT = Sampling(max_new_tokens=6)


@pytest.fixture
def rouge():
    pytest.importorskip("rouge_score", reason="rouge-score is not installed")


def f1(wanted, written, n):
    """ROUGE-n on words, from its definition."""

    def grams(text):
        words = text.split()
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    ours, theirs = grams(wanted), grams(written)
    common = sum(min(ours.count(gram), theirs.count(gram)) for gram in set(ours))
    if not common:
        return 0.0
    precision, recall = common / len(theirs), common / len(ours)
    return 2 * precision * recall / (precision + recall)


def make_t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, eos_token_id=2))


@pytest.mark.parametrize("kind", ["causal", "encoder-decoder"])
def test_scores_are_those_of_what_is_written(rouge, make_model, make_tokenizer, kind):
    model = make_model() if kind == "causal" else make_t5()
    tokenizer = make_tokenizer(eos_token="</s>")
    told = []
    found = summarize_documents(model, tokenizer, PAIRS, sampling=SHORT, progress=lambda *done: told.append(done))
    assert len(found.texts) == 3
    assert told[-1] == (3, 3)
    for n in (1, 2):
        expected = [f1(pair.summary, text, n) for pair, text in zip(PAIRS, found.texts, strict=True)]
        assert found.each[f"rouge{n}"].means == pytest.approx(expected)
        assert found.rouge[f"rouge{n}"] == pytest.approx(sum(expected) / 3)
    assert found.shortened == 0
    assert ("TL;DR" in found.settings["template"]) == (kind == "causal")
    assert summarize_documents(model, tokenizer, PAIRS, sampling=SHORT).texts == found.texts


def test_a_perfect_summary_scores_one(rouge, make_model, make_tokenizer):
    model, tokenizer = make_model(), make_tokenizer(eos_token="</s>")
    written = summarize_documents(model, tokenizer, PAIRS, sampling=SHORT).texts
    perfect = [SummaryPair(pair.document, text) for pair, text in zip(PAIRS, written, strict=True)]
    found = summarize_documents(model, tokenizer, perfect, sampling=SHORT)
    assert set(found.rouge.values()) == {1.0}


def test_long_documents_are_cut_to_fit(rouge, make_model, make_tokenizer):
    model, tokenizer = make_model(), make_tokenizer(eos_token="</s>")
    long = [SummaryPair("w1 " * 100, "w1"), *PAIRS]
    found = summarize_documents(model, tokenizer, long, sampling=SHORT, template="w5 {document} w6")
    assert found.shortened == 1
    with pytest.raises(EvalError, match="the template alone takes more than the 26 tokens"):
        summarize_documents(model, tokenizer, long, sampling=SHORT, template="{document}" + " w1" * 40)
    with pytest.raises(EvalError, match="one place for the document"):
        summarize_documents(model, tokenizer, long, template="nothing")


def test_pairs_are_read(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"article": p.document, "highlights": p.summary}) for p in PAIRS) + "\n\n")
    assert load_pairs(path, document="article", summary="highlights") == PAIRS
    with pytest.raises(EvalError, match=r"line 1: no JSON object with the fields 'document' and 'summary'"):
        load_pairs(path)
    path.write_text('{"document": " ", "summary": "a"}')
    with pytest.raises(EvalError, match="must be text, and the first not empty"):
        load_pairs(path)
    path.write_text("\n")
    with pytest.raises(EvalError, match="no document in it"):
        load_pairs(path)
    with pytest.raises(EvalError, match="cannot be read"):
        load_pairs(tmp_path / "absent.jsonl")


def test_without_the_library_it_says_what_to_install(monkeypatch, make_model, make_tokenizer):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(EvalError, match=r"pip install 'quantlab\[eval\]'"):
        summarize_documents(make_model(), make_tokenizer(), PAIRS)
