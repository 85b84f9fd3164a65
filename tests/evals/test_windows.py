from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantlab_evals import EvalError, check_length, token_windows
from transformers import GPT2Config, LlamaConfig

words = st.lists(st.integers(0, 59).map("w{}".format), min_size=1, max_size=30).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(words, min_size=1, max_size=5),
    length=st.integers(2, 12),
    bos=st.booleans(),
    limit=st.none() | st.integers(1, 4),
)
def test_windows_are_the_token_stream_cut_up(make_tokenizer, documents, length, bos, limit):
    tokenizer = make_tokenizer("<s> $A </s>" if bos else "$A </s>")
    stream = tokenizer("\n\n".join(documents), add_special_tokens=False)["input_ids"]
    body = length - bos
    if len(stream) < body:
        with pytest.raises(EvalError, match=f"{len(stream)} tokens"):
            token_windows(tokenizer, documents, length, limit=limit)
        return
    windows = token_windows(tokenizer, documents, length, limit=limit)
    assert windows.length == length
    assert windows.bos == (1 if bos else None)
    text = windows.tokens
    if bos:
        assert (text[:, 0] == 1).all()
        text = text[:, 1:]
    used = text.flatten().tolist()
    assert used == stream[: len(used)]
    assert len(used) + windows.beyond_limit + windows.dropped_tail == len(stream) == windows.stream_tokens
    assert windows.dropped_tail < body
    assert len(windows) == min(len(stream) // body, limit or len(stream))
    if limit is None:
        assert windows.beyond_limit == 0


def test_bos_follows_the_tokenizer_unless_told_otherwise(make_tokenizer):
    documents = ["w0 w1 w2 w3 w4 w5"]
    plain, framed, bert = make_tokenizer(), make_tokenizer("<s> $A"), make_tokenizer("<s> $A </s>")
    named = make_tokenizer(bos_token="<s>")
    assert token_windows(plain, documents, 3).tokens.tolist() == [[4, 5, 6], [7, 8, 9]]
    assert token_windows(named, documents, 3).bos is None
    for tokenizer, bos in ((framed, "auto"), (bert, "auto"), (framed, True), (named, True)):
        tokens = token_windows(tokenizer, documents, 3, bos=bos).tokens
        assert tokens.tolist() == [[1, 4, 5], [1, 6, 7], [1, 8, 9]]
    assert token_windows(framed, documents, 3, bos=False).bos is None
    with pytest.raises(EvalError, match="neither a BOS nor a"):
        token_windows(plain, documents, 3, bos=True)
    with pytest.raises(EvalError, match=r"2 special tokens \(<pre>, <s>\).*bos=False"):
        token_windows(make_tokenizer("<pre> <s> $A"), documents, 3)


def test_no_document_is_cut_short_and_no_warning_is_given(make_tokenizer, caplog):
    documents = ["w1 " * 1000, "w2 " * 1000]
    logging.getLogger("transformers").addHandler(caplog.handler)
    windows = token_windows(make_tokenizer(), documents, 100)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert windows.tokens.shape == (20, 100)
    assert windows.dropped_tail == 0
    assert not caplog.records


@settings(max_examples=40, deadline=None)
@given(documents=st.lists(words, min_size=1, max_size=8), length=st.integers(2, 9), bos=st.booleans())
def test_every_token_knows_its_document(make_tokenizer, documents, length, bos):
    tokenizer = make_tokenizer("<s> $A" if bos else "$A")
    numbers = [number for number, document in enumerate(documents) for _ in document.split()]
    body = length - bos
    if len(numbers) < body:
        return
    found = token_windows(tokenizer, documents, length).document
    expected = torch.tensor(numbers[: len(numbers) // body * body]).view(-1, body)
    assert torch.equal(found[:, bos:], expected)
    assert not bos or torch.equal(found[:, 0], found[:, 1])


@pytest.mark.parametrize(
    ("documents", "length", "kind"),
    [(["w1 w2 w3 w4 w5 w6"] * 12, 2, "documents"), (["w1 w2 w3 w4"] * 40, 8, "windows"), (["w1 " * 99], 3, "windows")],
)
def test_the_coarser_of_windows_and_documents_is_resampled(make_tokenizer, documents, length, kind):
    windows = token_windows(make_tokenizer(), documents, length)
    values = torch.rand(len(windows), length - 1)
    found = windows.cluster_means(values)
    assert found.kind == kind
    assert len(found.means) == (len(documents) if kind == "documents" else len(windows))
    assert sum(found.tokens) == values.numel()
    assert found.mean == pytest.approx(values.double().mean().item())
    if kind == "documents":
        assert found.means[0] == pytest.approx(values[:3].double().mean().item())


def test_describe_tells_windows_apart_and_is_plain(make_tokenizer):
    tokenizer = make_tokenizer("<s> $A")
    one = token_windows(tokenizer, ["w1 w2 w3 w4", "w5"], 3, limit=1)
    assert one.describe() == one.describe() | {
        "windows": 1,
        "window_length": 3,
        "bos": 1,
        "documents": 2,
        "joiner": "\n\n",
        "stream_tokens": 5,
        "beyond_limit": 2,
        "dropped_tail": 1,
    }
    other = token_windows(tokenizer, ["w1 w3 w3 w4", "w5"], 3, limit=1)
    assert one.describe()["sha256"] != other.describe()["sha256"]


def test_too_little_is_refused_with_numbers_and_remedy(make_tokenizer):
    tokenizer = make_tokenizer("<s> $A")
    with pytest.raises(EvalError, match=r"2 tokens .*one window of 9 takes 8 .* windows of 3 tokens or fewer"):
        token_windows(tokenizer, ["w1 w2"], 9)
    assert torch.equal(token_windows(tokenizer, ["w1 w2"], 3).tokens, torch.tensor([[1, 5, 6]]))
    for length in (0, 1):
        with pytest.raises(EvalError, match="2 or more"):
            token_windows(tokenizer, ["w1 w2"], length)
    with pytest.raises(EvalError, match="limit is 0"):
        token_windows(tokenizer, ["w1 w2"], 2, limit=0)


def test_windows_longer_than_the_model_are_refused():
    check_length(LlamaConfig(max_position_embeddings=32), 32)
    with pytest.raises(EvalError, match=r"33 .*max_position_embeddings, 32"):
        check_length(LlamaConfig(max_position_embeddings=32), 33)
    with pytest.raises(EvalError, match="window length of 16 or less"):
        check_length(GPT2Config(n_positions=16), 17)
    check_length(object(), 10**6)
