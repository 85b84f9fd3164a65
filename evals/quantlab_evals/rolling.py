"""Perplexity as lm-eval measures it: each document by itself, per word, per byte and per token.

A document's tokens are all predicted, the first from a prefix token. A document longer than the window is
cut up, and its last window reaches back as far as a window goes (lm-eval's `loglikelihood_rolling`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .bootstrap import ClusterMeans, Interval
from .errors import EvalError
from .logits import Progress, describe_model, evaluating, input_device
from .perplexity import exp, exp_interval, token_nll
from .windows import check_length

DEFINITION = (
    "lm-eval's loglikelihood_rolling: each document by itself, tokenized as the tokenizer does it by default, after "
    "BOS (or EOS where there is none); windows that overlap by one token, the last one reaching back; the "
    "negative log-likelihood of all documents over the number of words (split at white space), bytes (UTF-8) "
    "or tokens"
)


@dataclass(frozen=True)
class RollingPerplexity:
    """lm-eval's perplexities of one model on some documents; `interval` is that of the word perplexity.

    `documents` holds the mean negative log-likelihood a word of each document, in nats.
    """

    word_perplexity: float
    byte_perplexity: float
    bits_per_byte: float
    token_perplexity: float
    interval: Interval | None
    nll: float
    words: int
    bytes: int
    tokens: int
    documents: ClusterMeans
    settings: dict[str, Any]


def rolling_perplexity(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[str],
    *,
    length: int | None = None,
    counted: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> RollingPerplexity:
    """Measure a causal language model as `DEFINITION` says.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        documents: what it reads; empty ones are skipped.
        length: tokens in a window; None: the model's number of positions, 2048 where it states none.
        counted: the documents whose words and bytes are counted, where they are others (lm-eval's `wikitext`
            takes out spaces before it measures, and counts the words before that).
        progress: told after each document.

    Raises:
        EvalError: windows are longer than the model's positions, no text, or the tokenizer has no prefix token.
    """
    config = getattr(model, "config", None)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    length = (longest or 2048) if length is None else length
    check_length(config, length)
    counted = documents if counted is None else counted
    if len(counted) != len(documents):
        raise EvalError(f"{len(counted)} documents to count and {len(documents)} to read; give one for each")
    kept = [(text, source) for text, source in zip(documents, counted, strict=True) if text]
    if not kept:
        raise EvalError("all documents are empty; give some text")
    prefix = prefix_token(tokenizer)
    nll, tokens, words, bytes_ = [], [], [], []
    with evaluating(model), torch.no_grad():
        for index, (text, source) in enumerate(kept):
            stream = list(tokenizer(text, verbose=False)["input_ids"])
            nll.append(sum(_window_nll(model, window, predicted) for window, predicted in _cut(stream, prefix, length)))
            tokens.append(len(stream))
            words.append(len(re.split(r"\s+", source)))
            bytes_.append(len(source.encode()))
            if progress is not None:
                progress(index + 1, len(kept))
    total = math.fsum(nll)
    each = ClusterMeans(
        "documents", tuple(words), tuple(entry / count for entry, count in zip(nll, words, strict=True))
    )
    return RollingPerplexity(
        word_perplexity=exp(total / sum(words)),
        byte_perplexity=exp(total / sum(bytes_)),
        bits_per_byte=total / sum(bytes_) / math.log(2),
        token_perplexity=exp(total / sum(tokens)),
        interval=exp_interval(each.interval()),
        nll=total,
        words=sum(words),
        bytes=sum(bytes_),
        tokens=sum(tokens),
        documents=each,
        settings={"definition": DEFINITION, "window_length": length, "prefix": prefix, **describe_model(model)},
    )


def _cut(stream: Sequence[int], prefix: int, length: int) -> Iterator[tuple[list[int], int]]:
    """Windows of at most `length + 1` tokens, and how many at the end of each are predicted."""
    framed = [prefix, *stream]
    for start in range(0, len(stream), length):
        end = min(start + length, len(stream))
        yield framed[max(0, end - length) : end + 1], end - start


def _window_nll(model: nn.Module, window: Sequence[int], predicted: int) -> float:
    """Negative log-likelihood of the last `predicted` tokens of a window, summed in float64."""
    tokens = torch.tensor(window, device=input_device(model))
    logits = model(input_ids=tokens[None, :-1]).logits[0, -predicted:]
    return float(token_nll(logits.float().log_softmax(-1), tokens[-predicted:].to(logits.device)).double().sum())


def prefix_token(tokenizer: Any) -> int:
    """The token before a document: BOS, or EOS. Raises `EvalError` if there is neither."""
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    raise EvalError("the tokenizer has neither a BOS nor an EOS token, and the first token of a document needs one")
